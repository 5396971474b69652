// PNG with "stored" deflate blocks: no compression library needed.
#include <unistd.h>

#include <algorithm>
#include <array>
#include <cstdio>
#include <fstream>

#include "twinflow_rt_embed.h"

namespace twinflow {

namespace {

using Bytes = std::vector<uint8_t>;
constexpr size_t kBlock = 65535;  // bytes of one stored block at most

void append32(Bytes& out, uint32_t value) {
  for (int shift = 24; shift >= 0; shift -= 8) out.push_back(static_cast<uint8_t>(value >> shift));
}

uint32_t crc32(const uint8_t* data, size_t size) {
  static const std::array<uint32_t, 256> table = [] {
    std::array<uint32_t, 256> t{};
    for (uint32_t n = 0; n < 256; ++n) {
      uint32_t c = n;
      for (int k = 0; k < 8; ++k) c = c & 1 ? 0xEDB88320u ^ c >> 1 : c >> 1;
      t[n] = c;
    }
    return t;
  }();
  uint32_t c = 0xFFFFFFFFu;
  for (size_t i = 0; i < size; ++i) c = table[(c ^ data[i]) & 255] ^ c >> 8;
  return ~c;
}

uint32_t adler32(const Bytes& data) {
  uint32_t a = 1, b = 0;
  for (const uint8_t byte : data) a = (a + byte) % 65521, b = (b + a) % 65521;
  return b << 16 | a;
}

void append_chunk(Bytes& png, const char* type, const Bytes& data) {
  append32(png, static_cast<uint32_t>(data.size()));
  const size_t start = png.size();
  png.insert(png.end(), type, type + 4);
  png.insert(png.end(), data.begin(), data.end());
  append32(png, crc32(png.data() + start, png.size() - start));
}

Bytes stored(const Bytes& raw) {
  Bytes out = {0x78, 0x01};
  for (size_t at = 0; at < raw.size(); at += kBlock) {
    const size_t n = std::min(kBlock, raw.size() - at);
    const uint8_t low = static_cast<uint8_t>(n), high = static_cast<uint8_t>(n >> 8);
    const uint8_t last = at + n == raw.size();
    out.insert(out.end(), {last, low, high, static_cast<uint8_t>(~low), static_cast<uint8_t>(~high)});
    out.insert(out.end(), raw.begin() + static_cast<std::ptrdiff_t>(at),
               raw.begin() + static_cast<std::ptrdiff_t>(at + n));
  }
  append32(out, adler32(raw));
  return out;
}

}  // namespace

void write_png(const std::string& path, const Image& image) {
  const int64_t row = 3 * image.width;
  if (image.height < 1 || image.width < 1 || image.height > 65535 || image.width > 65535 ||
      static_cast<int64_t>(image.pixels.size()) != image.height * row || image.height * row > INT32_MAX / 2)
    throw Error(path + ": an image needs height x width x 3 bytes, both from 1 to 65535, and less than 1 GB");
  Bytes raw;
  raw.reserve(static_cast<size_t>(image.height * (row + 1)));
  for (int64_t y = 0; y < image.height; ++y) {
    raw.push_back(0);  // no filter
    raw.insert(raw.end(), image.pixels.begin() + y * row, image.pixels.begin() + (y + 1) * row);
  }
  Bytes png = {0x89, 'P', 'N', 'G', '\r', '\n', 0x1A, '\n'}, header;
  append32(header, static_cast<uint32_t>(image.width));
  append32(header, static_cast<uint32_t>(image.height));
  header.insert(header.end(), {8, 2, 0, 0, 0});  // 8 bits, RGB, deflate, adaptive filters, not interlaced
  append_chunk(png, "IHDR", header);
  append_chunk(png, "IDAT", stored(raw));
  append_chunk(png, "IEND", {});

  const std::string partial = path + "." + std::to_string(::getpid()) + ".part";
  {
    std::ofstream file(partial, std::ios::binary);
    file.write(reinterpret_cast<const char*>(png.data()), static_cast<std::streamsize>(png.size()));
    file.close();
    if (!file) {
      std::remove(partial.c_str());
      throw Error(path + " cannot be written");
    }
  }
  if (std::rename(partial.c_str(), path.c_str()) != 0) {
    std::remove(partial.c_str());
    throw Error(path + " cannot be written");
  }
}

}  // namespace twinflow
