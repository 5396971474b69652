#include "json.h"

#include <cmath>
#include <cstdlib>

#include "twinflow_rt_embed.h"

namespace twinflow {

namespace {
constexpr int kDeepest = 32;
constexpr double kExact = 9007199254740992.0;  // 2^53: whole numbers up to here are exact in a double
}  // namespace

class JsonReader {
 public:
  JsonReader(const std::string& text, const std::string& where) : text_(text), where_(where) {}

  Json document() {
    Json value = read(where_, 0);
    skip_blanks();
    if (at_ != text_.size()) fail("ends later than its value");
    return value;
  }

 private:
  [[noreturn]] void fail(const std::string& why) const {
    throw Error(where_ + " is not JSON: it " + why + " (byte " + std::to_string(at_) + ")");
  }

  void skip_blanks() {
    while (at_ < text_.size() && std::string(" \t\r\n").find(text_[at_]) != std::string::npos) ++at_;
  }

  char peek() {
    skip_blanks();
    if (at_ == text_.size()) fail("ends early");
    return text_[at_];
  }

  bool take(char c) {
    if (peek() != c) return false;
    ++at_;
    return true;
  }

  void expect(char c) {
    if (!take(c)) fail(std::string("lacks a '") + c + "'");
  }

  bool word(const char* letters) {
    const std::string wanted(letters);
    if (text_.compare(at_, wanted.size(), wanted) != 0) return false;
    at_ += wanted.size();
    return true;
  }

  // NOLINTBEGIN(misc-no-recursion): at most kDeepest calls deep
  Json read(const std::string& name, int depth) {
    if (depth > kDeepest) fail("is nested too deeply");
    Json value;
    value.name_ = name;
    const char first = peek();
    if (first == '{') {
      read_object(value, depth);
    } else if (first == '[') {
      read_array(value, depth);
    } else if (first == '"') {
      value.kind_ = Json::Kind::String;
      value.text_ = string();
    } else if (word("null")) {
    } else if (word("true") || word("false")) {
      value.kind_ = Json::Kind::Bool;
    } else {
      value.kind_ = Json::Kind::Number;
      value.number_ = number();
    }
    return value;
  }

  void read_object(Json& value, int depth) {
    value.kind_ = Json::Kind::Object;
    expect('{');
    if (take('}')) return;
    do {
      if (peek() != '"') fail("has a key that is no string");
      const std::string key = string();
      expect(':');
      if (!value.members_.emplace(key, read(value.name_ + ": " + key, depth + 1)).second) fail("has a key twice");
    } while (take(','));
    expect('}');
  }

  void read_array(Json& value, int depth) {
    value.kind_ = Json::Kind::Array;
    expect('[');
    if (take(']')) return;
    do value.items_.push_back(read(value.name_, depth + 1));
    while (take(','));
    expect(']');
  }
  // NOLINTEND(misc-no-recursion)

  double number() {
    const size_t end = text_.find_first_not_of("+-.0123456789eE", at_);
    const std::string digits = text_.substr(at_, end == std::string::npos ? end : end - at_);
    char* stop = nullptr;
    const double value = std::strtod(digits.c_str(), &stop);
    if (digits.empty() || *stop != '\0' || !std::isfinite(value)) fail("has something that is no value");
    at_ += digits.size();
    return value;
  }

  std::string string() {
    std::string out;
    for (++at_; at_ < text_.size(); ++at_) {
      const char c = text_[at_];
      if (c == '"') {
        ++at_;
        return out;
      }
      if (static_cast<unsigned char>(c) < 0x20) fail("has a control character in a string");
      if (c == '\\')
        escape(out);
      else
        out += c;
    }
    fail("has a string without end");
  }

  void escape(std::string& out) {
    static const std::string codes = "\"\\/bfnrt", meanings = "\"\\/\b\f\n\r\t";
    const char c = ++at_ < text_.size() ? text_[at_] : '\0';
    const size_t plain = codes.find(c);
    if (c != 'u' && (c == '\0' || plain == std::string::npos)) fail("has an unknown escape");
    if (c != 'u') {
      out += meanings[plain];
      return;
    }
    uint32_t point = hex();
    if (point >= 0xD800 && point < 0xDC00) {  // the first half of a pair
      if (text_.compare(at_ + 1, 2, "\\u") != 0) fail("has half a surrogate pair");
      at_ += 2;
      const uint32_t second = hex();
      if (second < 0xDC00 || second > 0xDFFF) fail("has half a surrogate pair");
      point = 0x10000 + ((point - 0xD800) << 10) + (second - 0xDC00);
    }
    utf8(out, point);
  }

  uint32_t hex() {  // the four digits after at_
    uint32_t point = 0;
    for (int i = 0; i < 4; ++i) {
      const char c = ++at_ < text_.size() ? text_[at_] : '\0';
      const size_t digit = std::string("0123456789abcdefABCDEF").find(c);
      if (c == '\0' || digit == std::string::npos) fail("has an incomplete \\u escape");
      point = point * 16 + static_cast<uint32_t>(digit < 16 ? digit : digit - 6);
    }
    return point;
  }

  static void utf8(std::string& out, uint32_t point) {
    const auto byte = [&](uint32_t bits) { out += static_cast<char>(bits); };
    if (point < 0x80) return byte(point);
    if (point < 0x800) {
      byte(0xC0 | point >> 6);
    } else if (point < 0x10000) {
      byte(0xE0 | point >> 12), byte(0x80 | (point >> 6 & 0x3F));
    } else {
      byte(0xF0 | point >> 18), byte(0x80 | (point >> 12 & 0x3F)), byte(0x80 | (point >> 6 & 0x3F));
    }
    byte(0x80 | (point & 0x3F));
  }

  const std::string& text_;
  const std::string& where_;
  size_t at_ = 0;
};

Json Json::parse(const std::string& text, const std::string& where) { return JsonReader(text, where).document(); }

void Json::refuse(const char* wanted) const { throw Error(name_ + " must be " + wanted); }

const Json& Json::operator[](const std::string& key) const {
  const auto found = members().find(key);
  if (found == members_.end()) throw Error(name_ + " lacks \"" + key + "\"");
  return found->second;
}

const std::string& Json::text() const {
  if (kind_ != Kind::String) refuse("a string");
  return text_;
}

int64_t Json::integer() const {
  if (kind_ != Kind::Number || number_ != std::floor(number_) || std::fabs(number_) > kExact) refuse("a whole number");
  return static_cast<int64_t>(number_);
}

const std::vector<Json>& Json::items() const {
  if (kind_ != Kind::Array) refuse("a list");
  return items_;
}

const std::map<std::string, Json>& Json::members() const {
  if (kind_ != Kind::Object) refuse("an object");
  return members_;
}

std::vector<int64_t> Json::integers() const {
  std::vector<int64_t> out;
  for (const Json& item : items()) out.push_back(item.integer());
  return out;
}

}  // namespace twinflow
