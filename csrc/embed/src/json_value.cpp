#include "json_value.h"

#include <algorithm>
#include <limits>
#include <nlohmann/json.hpp>
#include <set>
#include <utility>

#include "twinflow_rt_embed.h"

namespace twinflow {

namespace {

using nlohmann::json;

constexpr int kDeepest = 32;

// What nlohmann-json says, without its error number and without the text it stopped at, which may be of any length and
// no UTF-8: "[json.exception.parse_error.101] parse error at line 1, column 2: WHY; last read: 'TEXT'; expected ...",
// "[json.exception.out_of_range.406] number overflow parsing 'TEXT'".
std::string reason(const json::exception& error) {
  const std::string said = error.what();
  const size_t start = said.find("] ") + 2;
  const size_t end = std::min(said.find("; last read: '", start), said.find(" parsing '", start));
  return said.substr(start, end - start);
}

// Called for every part of a document while it is read. Refuses what the parser lets pass: nlohmann-json has no limit
// of depth, and of equal keys it keeps the last.
class Watch {
 public:
  bool operator()(int depth, json::parse_event_t event, json& parsed) {
    const bool opens = event == json::parse_event_t::object_start || event == json::parse_event_t::array_start;
    if (opens && depth > kDeepest) throw Error("it is nested too deeply");
    if (event == json::parse_event_t::object_start) keys_.emplace_back();
    if (event == json::parse_event_t::object_end) keys_.pop_back();
    if (event == json::parse_event_t::key && !keys_.back().insert(parsed.get_ref<const std::string&>()).second)
      throw Error("it has a key twice");
    return true;
  }

 private:
  std::vector<std::set<std::string>> keys_;  // of the objects that are open
};

json read(const std::string& text) {
  // nlohmann-json takes a zero byte for the end of the text
  if (text.find('\0') != std::string::npos) throw Error("it has a zero byte");
  Watch watch;
  const json::parser_callback_t callback = [&](int depth, json::parse_event_t event, json& parsed) {
    return watch(depth, event, parsed);
  };
  try {
    return json::parse(text, callback);
  } catch (const json::exception& error) {
    throw Error(reason(error));
  }
}

}  // namespace

JsonValue::JsonValue(std::shared_ptr<const json> value, std::string name)
    : value_(std::move(value)), name_(std::move(name)) {}

JsonValue JsonValue::parse(const std::string& text, const std::string& where) {
  try {
    return {std::make_shared<const json>(read(text)), where};
  } catch (const Error& error) {
    throw Error(where + " is not JSON: " + error.what());
  }
}

JsonValue JsonValue::part(const json& value, const std::string& name) const { return {{value_, &value}, name}; }

void JsonValue::refuse(const char* wanted) const { throw Error(name_ + " must be " + wanted); }

bool JsonValue::is_null() const { return value_->is_null(); }

bool JsonValue::has(const std::string& key) const { return value_->contains(key); }

JsonValue JsonValue::operator[](const std::string& key) const {
  if (!value_->is_object()) refuse("an object");
  const auto found = value_->find(key);
  if (found == value_->end()) throw Error(name_ + " lacks \"" + key + "\"");
  return part(*found, name_ + ": " + key);
}

const std::string& JsonValue::text() const {
  if (!value_->is_string()) refuse("a string");
  return value_->get_ref<const std::string&>();
}

int64_t JsonValue::integer() const {
  constexpr uint64_t kLargest = std::numeric_limits<int64_t>::max();
  if (!value_->is_number_integer() || (value_->is_number_unsigned() && value_->get<uint64_t>() > kLargest))
    refuse("a whole number");
  return value_->get<int64_t>();
}

std::vector<JsonValue> JsonValue::items() const {
  if (!value_->is_array()) refuse("a list");
  std::vector<JsonValue> out;
  out.reserve(value_->size());
  for (const json& item : *value_) out.push_back(part(item, name_));
  return out;
}

std::map<std::string, JsonValue> JsonValue::members() const {
  if (!value_->is_object()) refuse("an object");
  std::map<std::string, JsonValue> out;
  for (const auto& [key, value] : value_->items()) out.emplace(key, part(value, name_ + ": " + key));
  return out;
}

std::vector<int64_t> JsonValue::integers() const {
  std::vector<int64_t> out;
  for (const JsonValue& item : items()) out.push_back(item.integer());
  return out;
}

}  // namespace twinflow
