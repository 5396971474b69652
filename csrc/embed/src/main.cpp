// twinflow-embed: the library's example. Images from an exported model and prompt embeddings, as PNG files.
#include <algorithm>
#include <cerrno>
#include <cstdio>
#include <cstdlib>
#include <cstring>
#include <numeric>
#include <string>

#include "twinflow_rt_embed.h"

namespace {

const char* const kUsage =
    "usage: twinflow-embed MODEL.pt2 (--prompt FILE | --ids N,N,... [--ids ...] | --info) [-o FILE.png]\n"
    "                      [--size WxH] [--seed N] [--num-images N] [--verify]\n"
    "  --prompt      safetensors with prompt_embeds and lengths, as `twinflow-rt encode` writes\n"
    "  --ids         token ids of a prompt, for a file with a text encoder; once per prompt\n"
    "  --info        print what the file holds\n"
    "  -o            out.png by default; several images become out-0.png, out-1.png, ...\n"
    "  --seed        image k gets seed + k (default 0)\n"
    "  --num-images  images per prompt (default 1)\n"
    "  --verify      compare every part of the file with its SHA-256 first\n";

struct Options {
  std::string model, prompt, output = "out.png";
  std::vector<std::vector<int64_t>> ids;
  int64_t height = 0, width = 0, images = 1;
  uint64_t seed = 0;
  bool verify = false, info = false;
};

uint64_t number(const std::string& text, const std::string& option, uint64_t most = INT64_MAX) {
  char* end = nullptr;
  errno = 0;
  const unsigned long long value = std::strtoull(text.c_str(), &end, 10);
  if (text.empty() || text[0] < '0' || text[0] > '9' || *end != '\0' || errno != 0 || value > most)
    throw twinflow::Error(option + " " + text + ": a whole number from 0 to " + std::to_string(most) + " is needed");
  return value;
}

std::vector<int64_t> numbers(const std::string& text, char separator, const std::string& option) {
  std::vector<int64_t> out;
  for (size_t at = 0; at <= text.size();) {
    const size_t end = std::min(text.find(separator, at), text.size());
    out.push_back(static_cast<int64_t>(number(text.substr(at, end - at), option)));
    at = end + 1;
  }
  return out;
}

Options parse(int count, char** words) {
  Options options;
  for (int i = 1; i < count; ++i) {
    const std::string word = words[i];
    const auto value = [&]() -> std::string {
      if (i + 1 == count) throw twinflow::Error(word + " needs a value\n" + kUsage);
      return words[++i];
    };
    if (word == "--prompt") {
      options.prompt = value();
    } else if (word == "--ids") {
      options.ids.push_back(numbers(value(), ',', word));
    } else if (word == "-o") {
      options.output = value();
    } else if (word == "--seed") {
      options.seed = number(value(), word, UINT64_MAX);
    } else if (word == "--num-images") {
      options.images = static_cast<int64_t>(number(value(), word));
    } else if (word == "--size") {
      const std::vector<int64_t> size = numbers(value(), 'x', word);
      if (size.size() != 2) throw twinflow::Error("--size takes WIDTHxHEIGHT");
      options.width = size[0], options.height = size[1];
    } else if (word == "--verify") {
      options.verify = true;
    } else if (word == "--info") {
      options.info = true;
    } else if (word[0] != '-' && options.model.empty()) {
      options.model = word;
    } else {
      throw twinflow::Error("unknown argument " + word + "\n" + kUsage);
    }
  }
  const int sources = !options.prompt.empty() + !options.ids.empty() + options.info;
  if (options.model.empty() || sources != 1) throw twinflow::Error(std::string("nothing to do\n") + kUsage);
  if (options.images < 1 || options.images > 4096) throw twinflow::Error("--num-images is from 1 to 4096");
  return options;
}

void print(const twinflow::Facts& facts) {
  std::printf("%s (%s, %s on %s), %lld evaluation(s); torch %s, twinflow_rt %s\n", facts.model.c_str(),
              facts.family.c_str(), facts.dtype.c_str(), facts.device.c_str(),
              static_cast<long long>(facts.evaluations), facts.torch.c_str(), facts.twinflow_rt.c_str());
  for (const auto& [height, width] : facts.sizes)
    std::printf("size %lldx%lld\n", static_cast<long long>(width), static_cast<long long>(height));
  std::printf("prompts of %lld features, up to %lld rows; text encoder: %s\n",
              static_cast<long long>(facts.prompt_width), static_cast<long long>(facts.max_tokens),
              facts.vocabulary ? "yes" : "no");
}

std::string numbered(const std::string& output, size_t i, size_t count) {
  if (count == 1) return output;
  const size_t dot = output.rfind('.'), slash = output.rfind('/');
  const bool named = dot != std::string::npos && (slash == std::string::npos || dot > slash);
  const std::string stem = named ? output.substr(0, dot) : output, ending = named ? output.substr(dot) : "";
  return stem + "-" + std::to_string(i) + ending;
}

int run(const Options& options) {
  twinflow::Model model(options.model, options.verify);
  if (options.info) {
    print(model.facts());
    return 0;
  }
  const twinflow::Prompt prompt =
      options.ids.empty() ? twinflow::read_prompt(options.prompt) : model.encode(options.ids);
  std::vector<uint64_t> seeds(static_cast<size_t>(prompt.count * options.images));
  std::iota(seeds.begin(), seeds.end(), options.seed);
  if (!seeds.empty() && seeds.back() < options.seed) throw twinflow::Error("seeds are from 0 to 2^64 - 1");
  const auto images = model.generate(prompt, seeds, options.height, options.width);
  for (size_t i = 0; i < images.size(); ++i) {
    const std::string path = numbered(options.output, i, images.size());
    twinflow::write_png(path, images[i]);
    std::printf("wrote %s (seed %llu)\n", path.c_str(), static_cast<unsigned long long>(seeds[i]));
  }
  return 0;
}

}  // namespace

int main(int count, char** words) {
  try {
    if (count == 2 && (!std::strcmp(words[1], "--help") || !std::strcmp(words[1], "-h"))) {
      std::fputs(kUsage, stdout);
      return 0;
    }
    return run(parse(count, words));
  } catch (const std::exception& error) {
    std::fprintf(stderr, "twinflow-embed: %s\n", error.what());
    return 2;
  }
}
