// Reading parsed JSON (nlohmann-json) with refusals that name the place: "manifest: prompt: width must be ...".
#pragma once

#include <cstdint>
#include <map>
#include <memory>
#include <nlohmann/json_fwd.hpp>
#include <string>
#include <vector>

namespace twinflow {

// One value of a document. Cheap to copy; the document lives as long as any value of it.
class JsonValue {
 public:
  // Throws Error, naming `where`, for text that is not exactly one JSON value, is nested too deeply or has a key twice.
  static JsonValue parse(const std::string& text, const std::string& where);

  bool is_null() const;
  bool has(const std::string& key) const;

  // Throw Error where the value is of another kind, or absent.
  JsonValue operator[](const std::string& key) const;
  const std::string& text() const;
  int64_t integer() const;
  std::vector<JsonValue> items() const;
  std::map<std::string, JsonValue> members() const;
  std::vector<int64_t> integers() const;

 private:
  JsonValue(std::shared_ptr<const nlohmann::json> value, std::string name);
  JsonValue part(const nlohmann::json& value, const std::string& name) const;
  [[noreturn]] void refuse(const char* wanted) const;

  std::shared_ptr<const nlohmann::json> value_;
  std::string name_;  // the way to this value, for messages
};

}  // namespace twinflow
