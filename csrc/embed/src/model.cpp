#include <ATen/CPUGeneratorImpl.h>
#include <ATen/Version.h>
#include <ATen/core/Tensor.h>
#include <ATen/ops/empty.h>
#include <ATen/ops/from_blob.h>
#include <ATen/ops/stack.h>
#include <ATen/ops/zeros.h>
#include <c10/core/InferenceMode.h>
#include <caffe2/serialize/inline_container.h>
#include <fcntl.h>
#include <sys/mman.h>
#include <sys/stat.h>
#include <torch/csrc/inductor/aoti_package/model_package_loader.h>
#include <torch/version.h>
#include <unistd.h>

#include <algorithm>
#include <cstring>
#include <mutex>

#include "json_value.h"
#include "sha256.h"
#include "twinflow_rt_embed.h"

namespace twinflow {

namespace {

using torch::inductor::AOTIModelPackageLoader;

constexpr int64_t kFormat = 1;
constexpr const char* kWeights = "data/twinflow/";

at::ScalarType dtype_of(const std::string& name) {
  static const std::map<std::string, at::ScalarType> kDtypes = {
      {"float32", at::kFloat},  {"float16", at::kHalf}, {"bfloat16", at::kBFloat16},
      {"float64", at::kDouble}, {"int64", at::kLong},   {"int32", at::kInt},
      {"int8", at::kChar},      {"uint8", at::kByte},   {"bool", at::kBool},
  };
  const auto found = kDtypes.find(name);
  if (found == kDtypes.end()) throw Error("the manifest has an unknown dtype, " + name);
  return found->second;
}

// Any exception as ours, with what was being done; torch's without their stack traces.
template <class F>
auto translated(const std::string& doing, F&& f) {
  try {
    return f();
  } catch (const c10::Error& error) {
    throw Error(doing + ": " + error.what_without_backtrace());
  } catch (const std::exception& error) {
    throw Error(doing + ": " + error.what());
  }
}

// A whole file in memory, read when touched; shared with every process that maps it.
class Mapping {
 public:
  explicit Mapping(const std::string& path) {
    const int file = ::open(path.c_str(), O_RDONLY | O_CLOEXEC);
    struct stat facts{};
    if (file < 0 || ::fstat(file, &facts) != 0 || !S_ISREG(facts.st_mode)) {
      if (file >= 0) ::close(file);
      throw Error(path + " cannot be read");
    }
    size_ = static_cast<size_t>(facts.st_size);
    // private and writable, as tensors are: what is never written is never copied
    start_ = size_ == 0 ? MAP_FAILED : ::mmap(nullptr, size_, PROT_READ | PROT_WRITE, MAP_PRIVATE, file, 0);
    ::close(file);
    if (start_ == MAP_FAILED) throw Error(path + " cannot be mapped: it is empty, or memory is short");
  }
  ~Mapping() { ::munmap(start_, size_); }
  Mapping(const Mapping&) = delete;
  Mapping& operator=(const Mapping&) = delete;

  char* at(size_t offset, size_t bytes, const std::string& what) const {
    if (offset > size_ || bytes > size_ - offset) throw Error(what + " reaches beyond the end of the file");
    return static_cast<char*>(start_) + offset;
  }

 private:
  void* start_ = nullptr;
  size_t size_ = 0;
};

std::string record(caffe2::serialize::PyTorchStreamReader& archive, const std::string& name) {
  const auto [data, size] = archive.getRecord(name);
  return std::string(static_cast<const char*>(data.get()), size);
}

std::string major_minor(const std::string& version) {
  return version.substr(0, version.find('.', version.find('.') + 1));
}

// Refuses code compiled for another torch or another kind of processor (each runs the code of those before it).
void check_machine(const JsonValue& manifest) {
  const std::string made = major_minor(manifest["torch"].text()), here = major_minor(TORCH_VERSION);
  if (made != here) throw Error("it was compiled by torch " + made + ", this program has " + here);
  const std::vector<std::string> cpus = {"DEFAULT", "AVX2", "AVX512"};
  const auto rank = [&](const std::string& cpu) { return std::find(cpus.begin(), cpus.end(), cpu) - cpus.begin(); };
  const std::string needs = manifest["cpu"].text(), has = at::get_cpu_capability();
  const bool known = rank(needs) < 3 && rank(has) < 3;
  if (manifest["device"].text() == "cpu" && needs != has && !(known && rank(needs) < rank(has)))
    throw Error("it was compiled for processors with " + needs + ", this one has " + has);
}

Facts read_facts(const JsonValue& manifest) {
  Facts facts;
  facts.model = manifest["model"].text(), facts.family = manifest["family"].text();
  facts.dtype = manifest["dtype"].text(), facts.device = manifest["device"].text();
  facts.torch = manifest["torch"].text(), facts.twinflow_rt = manifest["twinflow_rt"].text();
  facts.evaluations = manifest["nfe"].integer();
  for (const JsonValue& size : manifest["sizes"].items()) {
    const std::vector<int64_t> pair = size.integers();
    if (pair.size() != 2 || pair[0] < 1 || pair[1] < 1) throw Error("the manifest has an impossible size");
    facts.sizes.emplace_back(pair[0], pair[1]);
  }
  if (facts.sizes.empty()) throw Error("the manifest has no sizes");
  const JsonValue& prompt = manifest["prompt"];
  facts.prompt_width = prompt["width"].integer(), facts.max_tokens = prompt["max_tokens"].integer();
  facts.rows_multiple = prompt["multiple"].integer();
  facts.fixed_tokens = prompt["fixed"].is_null() ? 0 : prompt["fixed"].integer();
  if (facts.prompt_width < 1 || facts.rows_multiple < 1 || facts.max_tokens < 1)
    throw Error("the manifest has impossible prompts");
  for (const JsonValue& extra : prompt["extras"].items()) {
    if (extra.items().size() != 2) throw Error("the manifest has an impossible extra input");
    facts.extras.emplace_back(extra.items()[0].text(), extra.items()[1].integer());
  }
  const JsonValue& text = manifest["text"];
  if (!text.is_null()) {
    facts.vocabulary = text["vocabulary"].integer(), facts.max_ids = text["max_tokens"].integer();
    facts.dropped_ids = text["dropped"].integer();
    if (!text["prefix"].is_null()) facts.prefix = text["prefix"].text();
    if (!text["suffix"].is_null()) facts.suffix = text["suffix"].text();
  }
  return facts;
}

// The 32-bit generator seed of (seed, stream); twinflow_rt/sampling/noise.py says why.
uint64_t stream_seed(uint64_t seed, uint64_t stream) {
  if (stream == 0 && seed <= 0xFFFFFFFFu) return seed;
  uint64_t x = seed + stream * 0x9E3779B97F4A7C15u;  // splitmix64
  x = (x ^ x >> 30) * 0xBF58476D1CE4E5B9u;
  x = (x ^ x >> 27) * 0x94D049BB133111EBu;
  return (x ^ x >> 31) >> 32;
}

// Standard normals [seeds, shape...] float32, image by image from generators of their own.
at::Tensor normals(const std::vector<uint64_t>& seeds, uint64_t stream, const std::vector<int64_t>& shape) {
  std::vector<int64_t> all = {static_cast<int64_t>(seeds.size())};
  all.insert(all.end(), shape.begin(), shape.end());
  at::Tensor out = at::empty(all, at::kFloat);
  for (size_t i = 0; i < seeds.size(); ++i) {
    at::Generator generator = at::make_generator<at::CPUGeneratorImpl>(stream_seed(seeds[i], stream));
    out.select(0, static_cast<int64_t>(i)).normal_(0, 1, generator);
  }
  return out;
}

// A copy of `values` as a tensor of `shape`.
template <class T>
at::Tensor tensor_of(const std::vector<T>& values, const std::vector<int64_t>& shape, at::ScalarType dtype) {
  return at::from_blob(const_cast<T*>(values.data()), shape, at::TensorOptions(dtype)).clone();
}

void check_prompt(const Prompt& prompt, const Facts& facts) {
  const bool whole = prompt.count > 0 && prompt.rows > 0 && prompt.width == facts.prompt_width &&
                     prompt.embeds.size() / static_cast<size_t>(prompt.width) / static_cast<size_t>(prompt.rows) ==
                         static_cast<size_t>(prompt.count) &&
                     prompt.embeds.size() % static_cast<size_t>(prompt.width * prompt.rows) == 0 &&
                     prompt.lengths.size() == static_cast<size_t>(prompt.count);
  if (!whole)
    throw Error("prompt embeddings must be [count, rows, " + std::to_string(facts.prompt_width) +
                "] with one length per prompt");
  const int64_t least = std::max<int64_t>(facts.fixed_tokens, 1), most = std::min(prompt.rows, facts.max_tokens);
  for (const int64_t n : prompt.lengths)
    if (n < least || n > most)
      throw Error("a prompt of " + std::to_string(n) + " rows; this model and these embeddings allow " +
                  std::to_string(least) + " to " + std::to_string(most));
  for (const auto& [name, width] : facts.extras) {
    const auto found = prompt.extras.find(name);
    if (found == prompt.extras.end() || found->second.size() != static_cast<size_t>(prompt.count * width))
      throw Error("this model takes prompts with \"" + name + "\", " + std::to_string(width) + " numbers each");
  }
}

}  // namespace

struct Model::State {
  State(const std::string& file, bool verify)
      : path(file),
        map(file),
        archive(file),
        manifest(JsonValue::parse(record(archive, "extra/manifest.json"), "manifest")) {
    if (!manifest.has("format") || manifest["format"].integer() != kFormat)
      throw Error("it has another format than this library reads; export it again");
    check_machine(manifest);
    facts = read_facts(manifest);
    dtype = dtype_of(facts.dtype);
    if (facts.vocabulary != 0) least_ids = manifest["text"]["least_tokens"].integer();
    if (least_ids < 0 || least_ids > facts.max_ids) throw Error("the manifest has an impossible text encoder");
    if (verify)
      for (const auto& [name, known] : manifest["files"].members()) {
        const size_t size = archive.getRecordSize(name);
        if (sha256(map.at(archive.getRecordOffset(name), size, name), size) != known["sha256"].text())
          throw Error(name + " does not match its hash; it was changed or damaged");
      }
  }

  const at::Tensor& weight(const std::string& key) {
    const auto known = weights.find(key);
    if (known != weights.end()) return known->second;
    const JsonValue& what = manifest["weights"][key];
    const std::vector<int64_t> shape = what["shape"].integers(), strides = what["strides"].integers();
    const at::ScalarType type = dtype_of(what["dtype"].text());
    if (shape.size() != strides.size()) throw Error("weight " + key + " has an impossible layout");
    // the last element that is reached must lie in the record
    const size_t size = archive.getRecordSize(kWeights + key), item = at::elementSize(type);
    size_t last = 0;
    bool empty = false;
    for (size_t i = 0; i < shape.size(); ++i) {
      const bool possible =
          shape[i] >= 0 && strides[i] >= 0 &&
          (shape[i] < 2 || static_cast<size_t>(strides[i]) <= size / static_cast<size_t>(shape[i] - 1));
      if (!possible) throw Error("weight " + key + " has an impossible layout");
      empty = empty || shape[i] == 0;
      if (shape[i] > 1) last += static_cast<size_t>(shape[i] - 1) * static_cast<size_t>(strides[i]);
      if (last > size) throw Error("weight " + key + " reaches beyond its record");
    }
    if (!empty && (last + 1) * item > size) throw Error("weight " + key + " reaches beyond its record");
    char* data = map.at(archive.getRecordOffset(kWeights + key), size, "weight " + key);
    const at::Tensor tensor = at::from_blob(data, shape, strides, at::TensorOptions(type));
    return weights.emplace(key, facts.device == "cpu" ? tensor : tensor.to(at::Device(facts.device))).first->second;
  }

  at::Tensor run(const std::string& name, std::vector<at::Tensor> inputs) {
    auto& program = programs[name];
    if (!program) {
      auto fresh = std::make_unique<AOTIModelPackageLoader>(path, name);
      std::unordered_map<std::string, at::Tensor> constants;
      for (const auto& [constant, key] : manifest["programs"][name]["constants"].members())
        constants.emplace(constant, weight(key.text()));
      fresh->load_constants(constants, false, true, true);  // checked to be all; borrowed, not copied
      program = std::move(fresh);
    }
    for (at::Tensor& input : inputs) input = input.to(at::Device(facts.device)).contiguous();
    const std::vector<at::Tensor> outputs = program->boxed_run(std::move(inputs));
    if (outputs.size() != 1) throw Error("program " + name + " has not one output");
    return outputs[0].to(at::kCPU).contiguous();
  }

  std::string path;
  Mapping map;
  caffe2::serialize::PyTorchStreamReader archive;
  JsonValue manifest;
  Facts facts;
  at::ScalarType dtype = at::kFloat;
  int64_t least_ids = 0;                      // the text encoder's program takes no fewer; what is missing is padding
  std::map<std::string, at::Tensor> weights;  // declared before what borrows them
  std::map<std::string, std::unique_ptr<AOTIModelPackageLoader>> programs;
  std::mutex mutex;
};

Model::Model(const std::string& path, bool verify)
    : state_(translated(path, [&] { return std::make_unique<State>(path, verify); })) {}
Model::~Model() = default;
Model::Model(Model&&) noexcept = default;
Model& Model::operator=(Model&&) noexcept = default;

const Facts& Model::facts() const { return state_->facts; }

std::string Model::tokenizer() const {
  if (state_->facts.vocabulary == 0) throw Error("this file has no text encoder");
  const std::lock_guard<std::mutex> lock(state_->mutex);
  return translated("reading the tokenizer", [&] { return record(state_->archive, "extra/tokenizer.json"); });
}

Prompt Model::encode(const std::vector<std::vector<int64_t>>& ids) {
  const Facts& facts = state_->facts;
  if (facts.vocabulary == 0) throw Error("this file has no text encoder; export it with --text-encoder");
  Prompt prompt;
  size_t longest = static_cast<size_t>(state_->least_ids);
  for (const auto& row : ids) longest = std::max(longest, row.size());
  prompt.count = static_cast<int64_t>(ids.size());
  std::vector<int64_t> padded;
  for (const auto& row : ids) {
    const int64_t n = static_cast<int64_t>(row.size());
    if (n <= facts.dropped_ids || n > facts.max_ids)
      throw Error("a prompt of " + std::to_string(n) + " token ids; this model takes " +
                  std::to_string(facts.dropped_ids + 1) + " to " + std::to_string(facts.max_ids));
    for (const int64_t id : row)
      if (id < 0 || id >= facts.vocabulary)
        throw Error("token id " + std::to_string(id) + " is not below " + std::to_string(facts.vocabulary));
    padded.insert(padded.end(), row.begin(), row.end());
    padded.insert(padded.end(), longest - row.size(), 0);
    prompt.lengths.push_back(n - facts.dropped_ids);
  }
  if (ids.empty()) throw Error("no prompts to encode");
  const std::lock_guard<std::mutex> lock(state_->mutex);
  return translated("encoding prompts", [&] {
    const c10::InferenceMode guard;
    const at::Tensor given = tensor_of(padded, {prompt.count, static_cast<int64_t>(longest)}, at::kLong);
    const at::Tensor embeds = state_->run("text", {given}).to(at::kFloat).contiguous();
    prompt.rows = embeds.size(1), prompt.width = embeds.size(2);
    const float* values = embeds.const_data_ptr<float>();
    prompt.embeds.assign(values, values + embeds.numel());
    return prompt;
  });
}

std::vector<Image> Model::generate(const Prompt& prompt, const std::vector<uint64_t>& seeds, int64_t height,
                                   int64_t width) {
  const Facts& facts = state_->facts;
  height = height == 0 ? facts.sizes[0].first : height;
  width = width == 0 ? facts.sizes[0].second : width;
  if (std::find(facts.sizes.begin(), facts.sizes.end(), std::make_pair(height, width)) == facts.sizes.end())
    throw Error("no program for " + std::to_string(width) + "x" + std::to_string(height) + " was exported");
  check_prompt(prompt, facts);
  const int64_t images = static_cast<int64_t>(seeds.size());
  if (images == 0 || images % prompt.count != 0)
    throw Error(std::to_string(images) + " seeds for " + std::to_string(prompt.count) + " prompts; give a multiple");

  const std::lock_guard<std::mutex> lock(state_->mutex);
  return translated("generating", [&] {
    const c10::InferenceMode guard;
    const auto repeated = [&](const at::Tensor& x) { return x.repeat_interleave(images / prompt.count, 0); };
    const JsonValue &latent = state_->manifest["latent"], &noise = state_->manifest["noise"];
    const int64_t scale = latent["scale"].integer(), streams = noise["streams"].integer();
    if (scale < 1) throw Error("the manifest has an impossible latent scale");
    const std::vector<int64_t> shape = {latent["channels"].integer(), height / scale, width / scale};

    const int64_t longest = *std::max_element(prompt.lengths.begin(), prompt.lengths.end());
    const int64_t rows = (longest + facts.rows_multiple - 1) / facts.rows_multiple * facts.rows_multiple;
    const at::Tensor given = tensor_of(prompt.embeds, {prompt.count, prompt.rows, prompt.width}, at::kFloat);
    const at::Tensor embeds = at::zeros({prompt.count, rows, prompt.width}, at::kFloat);
    const int64_t kept = std::min(rows, prompt.rows);
    embeds.narrow(1, 0, kept).copy_(given.narrow(1, 0, kept));

    std::vector<at::Tensor> inputs = {normals(seeds, 0, shape).to(state_->dtype), repeated(embeds.to(state_->dtype)),
                                      repeated(tensor_of(prompt.lengths, {prompt.count}, at::kLong))};
    std::vector<at::Tensor> injected;
    injected.reserve(static_cast<size_t>(streams));
    for (int64_t i = 1; i <= streams; ++i) injected.push_back(normals(seeds, static_cast<uint64_t>(i), shape));
    if (streams > 0) inputs.push_back(at::stack(injected));
    for (const auto& [name, size] : facts.extras)
      inputs.push_back(repeated(tensor_of(prompt.extras.at(name), {prompt.count, size}, at::kFloat).to(state_->dtype)));

    const std::string name = "image_" + std::to_string(height) + "x" + std::to_string(width);
    const at::Tensor pixels = state_->run(name, std::move(inputs));
    const std::vector<int64_t> wanted = {images, height, width, 3};
    if (pixels.sizes() != at::IntArrayRef(wanted) || pixels.scalar_type() != at::kByte)
      throw Error("program " + name + " gave something else than images");
    std::vector<Image> out;
    out.reserve(seeds.size());
    const uint8_t* data = pixels.const_data_ptr<uint8_t>();
    const int64_t size = height * width * 3;
    for (int64_t i = 0; i < images; ++i)
      out.push_back({height, width, std::vector<uint8_t>(data + i * size, data + (i + 1) * size)});
    return out;
  });
}

}  // namespace twinflow
