// From the VAE's output to bytes.
#pragma once

#include "common.h"

namespace {

// n bytes of one channel; column is the distance between the pixels of source.
template <class T>
inline void quantize(const T* source, int64_t column, uint8_t* bytes, int64_t n) {
#pragma omp simd
  for (int64_t i = 0; i < n; ++i) {
    float v = load(source[i * column]) * 0.5f + 0.5f;
    v = v > 0.0f ? v : 0.0f;  // NaN too
    v = v < 1.0f ? v : 1.0f;
    bytes[i] = static_cast<uint8_t>(static_cast<int32_t>(std::nearbyint(v * 255.0f)));
  }
}

template <class T>
void to_uint8(const T* image, const twinflow_image& at, uint8_t* out, const twinflow_image& size, int threads) {
  const int64_t channels = size.channels, height = size.height, width = size.width;
#pragma omp parallel for num_threads(team(size.batch * height * width * channels, threads)) schedule(static)
  for (int64_t row = 0; row < size.batch * height; ++row)
    for (int64_t c = 0; c < channels; ++c) {
      const T* source = image + row / height * at.batch + c * at.channels + row % height * at.height;
      uint8_t* target = out + row * width * channels + c;
      for (int64_t x = 0; x < width; x += TILE) {
        uint8_t bytes[TILE];
        const int64_t n = width - x < TILE ? width - x : TILE;
        if (at.width == 1)  // a constant stride vectorises
          quantize(source + x, 1, bytes, n);
        else
          quantize(source + x * at.width, at.width, bytes, n);
        for (int64_t i = 0; i < n; ++i) target[(x + i) * channels] = bytes[i];
      }
    }
}

int launch_to_uint8(const void* image, twinflow_image strides, uint8_t* out, twinflow_image size, twinflow_launch how) {
  if (size.batch < 0 || size.channels < 1 || size.height < 0 || size.width < 0) return TWINFLOW_BAD_SHAPE;
  if (size.batch * size.height * size.width > 0 && !(image && out)) return TWINFLOW_NULL_POINTER;
  return typed(how.dtype,
               [&](auto t) { to_uint8(static_cast<const decltype(t)*>(image), strides, out, size, how.threads); });
}

}  // namespace
