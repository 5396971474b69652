// JSON, as much as manifests and safetensors headers need: checked, bounded in depth, no key twice.
#pragma once

#include <cstdint>
#include <map>
#include <string>
#include <vector>

namespace twinflow {

class Json {
 public:
  enum class Kind : uint8_t { Null, Bool, Number, String, Array, Object };

  // Throws Error, naming `where`, for anything but one JSON value.
  static Json parse(const std::string& text, const std::string& where);

  bool is_null() const { return kind_ == Kind::Null; }
  bool has(const std::string& key) const { return kind_ == Kind::Object && members_.count(key) != 0; }

  // Throw Error where the value is of another kind, or absent.
  const Json& operator[](const std::string& key) const;
  const std::string& text() const;
  int64_t integer() const;  // a whole number, exactly representable
  const std::vector<Json>& items() const;
  const std::map<std::string, Json>& members() const;
  std::vector<int64_t> integers() const;

 private:
  friend class JsonReader;
  [[noreturn]] void refuse(const char* wanted) const;

  Kind kind_ = Kind::Null;
  double number_ = 0;
  std::string text_, name_;  // name_: the way to this value, for messages
  std::vector<Json> items_;
  std::map<std::string, Json> members_;
};

}  // namespace twinflow
