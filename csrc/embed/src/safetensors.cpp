// Prompt embeddings from safetensors: 8 bytes of header size, a JSON header, then the tensors' bytes.
#include <sys/stat.h>

#include <cstring>
#include <fstream>
#include <limits>

#include "json_value.h"
#include "twinflow_rt_embed.h"

namespace twinflow {

namespace {

constexpr uint64_t kLargestHeader = 100u << 20;

// Bytes of an element; 0 for a dtype that is not read.
int64_t item_size(const std::string& dtype) {
  if (dtype == "F16" || dtype == "BF16") return 2;
  if (dtype == "F32" || dtype == "I32") return 4;
  return dtype == "I64" ? 8 : 0;
}

struct Stored {
  std::string name, dtype;
  std::vector<int64_t> shape;
  int64_t count = 0;
  const char* bytes = nullptr;
};

std::string read_file(const std::string& path) {
  struct stat facts{};
  std::ifstream file(path, std::ios::binary | std::ios::ate);
  if (!file || ::stat(path.c_str(), &facts) != 0 || !S_ISREG(facts.st_mode)) throw Error(path + " cannot be read");
  std::string content(static_cast<size_t>(file.tellg()), '\0');
  file.seekg(0);
  if (!file.read(content.data(), static_cast<std::streamsize>(content.size()))) throw Error(path + " cannot be read");
  return content;
}

// Elements of a shape; throws where they would not fit in memory.
int64_t elements(const std::vector<int64_t>& shape, const std::string& what) {
  int64_t count = 1;
  for (const int64_t n : shape) {
    if (n < 0 || (n > 0 && count > std::numeric_limits<int64_t>::max() / 8 / n))
      throw Error(what + ": impossible shape");
    count *= n;
  }
  return count;
}

Stored locate(const std::string& name, const JsonValue& entry, const std::string& path, const char* data,
              int64_t size) {
  const std::string what = path + ": " + name;
  Stored out{name, entry["dtype"].text(), entry["shape"].integers(), 0, nullptr};
  const std::vector<int64_t> ends = entry["data_offsets"].integers();
  const int64_t item = item_size(out.dtype);
  if (item == 0) throw Error(what + " has dtype " + out.dtype + "; prompts are F32, F16, BF16, I64 or I32");
  out.count = elements(out.shape, what);
  if (ends.size() != 2 || ends[0] < 0 || ends[1] < ends[0] || ends[1] > size)
    throw Error(what + " reaches beyond the end of the file, which is damaged or cut short");
  if (ends[1] - ends[0] != out.count * item) throw Error(what + ": its bytes do not fit its shape");
  out.bytes = data + ends[0];
  return out;
}

template <class T>
T load(const char* bytes, int64_t i) {
  T value;
  std::memcpy(&value, bytes + i * static_cast<int64_t>(sizeof(T)), sizeof(T));
  return value;
}

float from_bits(uint32_t bits) {
  float value;
  std::memcpy(&value, &bits, sizeof value);
  return value;
}

float from_half(uint16_t half) {
  const uint32_t sign = (half & 0x8000u) << 16, exponent = half >> 10 & 31, fraction = half & 0x3FFu;
  if (exponent == 31) return from_bits(sign | 0x7F800000u | fraction << 13);
  if (exponent == 0) return (sign ? -1.0f : 1.0f) * static_cast<float>(fraction) * 5.9604644775390625e-8f;  // 2^-24
  return from_bits(sign | (exponent + 112) << 23 | fraction << 13);
}

std::vector<float> floats(const Stored& tensor, const std::string& path) {
  std::vector<float> out(static_cast<size_t>(tensor.count));
  for (int64_t i = 0; i < tensor.count; ++i) {
    float& value = out[static_cast<size_t>(i)];
    if (tensor.dtype == "F32")
      value = load<float>(tensor.bytes, i);
    else if (tensor.dtype == "BF16")
      value = from_bits(static_cast<uint32_t>(load<uint16_t>(tensor.bytes, i)) << 16);
    else if (tensor.dtype == "F16")
      value = from_half(load<uint16_t>(tensor.bytes, i));
    else
      throw Error(path + ": " + tensor.name + " must be floating point, not " + tensor.dtype);
  }
  return out;
}

std::vector<int64_t> integers(const Stored& tensor, const std::string& path) {
  std::vector<int64_t> out(static_cast<size_t>(tensor.count));
  for (int64_t i = 0; i < tensor.count; ++i) {
    if (tensor.dtype != "I64" && tensor.dtype != "I32")
      throw Error(path + ": " + tensor.name + " must be whole numbers, not " + tensor.dtype);
    out[static_cast<size_t>(i)] =
        tensor.dtype == "I64" ? load<int64_t>(tensor.bytes, i) : load<int32_t>(tensor.bytes, i);
  }
  return out;
}

}  // namespace

Prompt read_prompt(const std::string& path) {
  const std::string content = read_file(path);
  uint64_t header = 0;
  for (int i = 7; i >= 0 && content.size() >= 8; --i) header = header << 8 | static_cast<unsigned char>(content[i]);
  if (content.size() < 8 || header > kLargestHeader || header > content.size() - 8)
    throw Error(path + " is no safetensors file, or cut short");
  const JsonValue names = JsonValue::parse(content.substr(8, header), path);
  const char* data = content.data() + 8 + header;
  const int64_t size = static_cast<int64_t>(content.size() - 8 - header);

  Prompt prompt;
  std::map<std::string, Stored> tensors;
  for (const auto& [name, entry] : names.members())
    if (name != "__metadata__") tensors.emplace(name, locate(name, entry, path, data, size));
  const auto embeds = tensors.find("prompt_embeds");
  if (embeds == tensors.end()) throw Error(path + " lacks prompt_embeds; write it with `twinflow-rt encode`");
  const std::vector<int64_t>& shape = embeds->second.shape;
  if (shape.size() != 3 || embeds->second.count == 0)
    throw Error(path + ": prompt_embeds must be [B, L, D], not empty");
  prompt.count = shape[0], prompt.rows = shape[1], prompt.width = shape[2];
  prompt.embeds = floats(embeds->second, path);
  prompt.lengths.assign(static_cast<size_t>(prompt.count), prompt.rows);
  const std::string extra = "extras.";
  for (const auto& [name, tensor] : tensors) {
    const bool is_extra = name.compare(0, extra.size(), extra) == 0;
    if (!is_extra && name != "lengths") continue;
    const size_t axes = is_extra ? 2 : 1;
    if (tensor.shape.size() != axes || tensor.shape[0] != prompt.count)
      throw Error(std::string(path).append(": ").append(name) + (is_extra ? " must have 2 axes" : " must have 1 axis") +
                  ", the first of one entry per prompt");
    if (is_extra)
      prompt.extras[name.substr(extra.size())] = floats(tensor, path);
    else
      prompt.lengths = integers(tensor, path);
  }
  return prompt;
}

}  // namespace twinflow
