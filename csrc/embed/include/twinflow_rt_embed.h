// twinflow_rt in C++ programs: runs what `twinflow-rt export` wrote, without Python. No torch types here.
//
//   twinflow::Model model("model.pt2");
//   twinflow::Prompt prompt = twinflow::read_prompt("prompt.safetensors");
//   twinflow::write_png("out.png", model.generate(prompt, {0})[0]);
//
// Every failure is a twinflow::Error that says what is wrong and where. A Model may be used from several
// threads; its calls wait for each other.
#pragma once

#include <cstdint>
#include <map>
#include <memory>
#include <stdexcept>
#include <string>
#include <utility>
#include <vector>

namespace twinflow {

struct Error : std::runtime_error {
  using std::runtime_error::runtime_error;
};

// What a network takes of `count` prompts. embeds: [count, rows, width], row-major; prompt b's first
// lengths[b] rows count. extras: further vectors by name, e.g. "pooled", [count, any].
struct Prompt {
  int64_t count = 0, rows = 0, width = 0;
  std::vector<float> embeds;
  std::vector<int64_t> lengths;
  std::map<std::string, std::vector<float>> extras;
};

// pixels: [height, width, 3], red green blue.
struct Image {
  int64_t height = 0, width = 0;
  std::vector<uint8_t> pixels;
};

// What the manifest says. sizes: (height, width) of the programs. rows_multiple, max_tokens, fixed_tokens (0: any
// number), extras (name, width): of prompts. vocabulary, max_ids: of the text encoder; 0 where it was not exported.
// prefix, suffix: what a prompt is written between before tokenizer.json's tokenizer reads it.
struct Facts {
  std::string model, family, dtype, device, torch, twinflow_rt;
  int64_t evaluations = 0;
  std::vector<std::pair<int64_t, int64_t>> sizes;
  int64_t prompt_width = 0, rows_multiple = 1, max_tokens = 0, fixed_tokens = 0;
  std::vector<std::pair<std::string, int64_t>> extras;
  int64_t vocabulary = 0, max_ids = 0, dropped_ids = 0;
  std::string prefix, suffix;
};

class Model {
 public:
  // Opens an exported file; its weights are mapped, so it must stay as it is. verify: read every part once and
  // compare it with its SHA-256. Programs are loaded when first used.
  explicit Model(const std::string& path, bool verify = false);
  ~Model();
  Model(Model&&) noexcept;
  Model& operator=(Model&&) noexcept;

  const Facts& facts() const;

  // tokenizer.json of the exported text encoder.
  std::string tokenizer() const;

  // Embeddings of prompts given as token ids, by the exported text encoder.
  Prompt encode(const std::vector<std::vector<int64_t>>& ids);

  // One image per seed, which must be as many as prompts, or a multiple: then the first of them belong to the
  // first prompt. A seed means the same image as in Python. height, width: one of facts().sizes; 0: the first.
  std::vector<Image> generate(const Prompt& prompt, const std::vector<uint64_t>& seeds, int64_t height = 0,
                              int64_t width = 0);

 private:
  struct State;
  std::unique_ptr<State> state_;
};

// A safetensors file as `twinflow-rt encode` writes: `prompt_embeds` [B, L, D] (F32, F16 or BF16), `lengths` [B]
// (I64 or I32; absent: all L) and `extras.NAME` [B, P], floating point, which become extras.
Prompt read_prompt(const std::string& path);

// An 8-bit RGB PNG; there whole or not at all.
void write_png(const std::string& path, const Image& image);

}  // namespace twinflow
