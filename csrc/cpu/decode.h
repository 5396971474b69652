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
void to_uint8(const T* image, const int64_t* s, uint8_t* out, int64_t batch, int64_t channels, int64_t height,
              int64_t width, int threads) {
#pragma omp parallel for num_threads(team(batch * height * width * channels, threads)) schedule(static)
  for (int64_t row = 0; row < batch * height; ++row)
    for (int64_t c = 0; c < channels; ++c) {
      const T* source = image + row / height * s[0] + c * s[1] + row % height * s[2];
      uint8_t* target = out + row * width * channels + c;
      for (int64_t x = 0; x < width; x += TILE) {
        uint8_t bytes[TILE];
        const int64_t n = width - x < TILE ? width - x : TILE;
        if (s[3] == 1)  // a constant stride vectorises
          quantize(source + x, 1, bytes, n);
        else
          quantize(source + x * s[3], s[3], bytes, n);
        for (int64_t i = 0; i < n; ++i) target[(x + i) * channels] = bytes[i];
      }
    }
}

int c_to_uint8(const void* image, const int64_t strides[4], uint8_t* out, int64_t batch, int64_t channels,
               int64_t height, int64_t width, int dtype, int threads) {
  if (batch < 0 || channels < 1 || height < 0 || width < 0) return TWINFLOW_BAD_SHAPE;
  if (batch * height * width > 0 && !(image && strides && out)) return TWINFLOW_NULL_POINTER;
  return typed(dtype, [&](auto t) {
    to_uint8(static_cast<const decltype(t)*>(image), strides, out, batch, channels, height, width, threads);
  });
}

}  // namespace
