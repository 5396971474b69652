// Weights of 4 bits in groups: widened to what a product multiplies, and their product with rows of int8.
#pragma once

#include "linear.h"

namespace {

constexpr int64_t HALF = 32;  // codes in the low halves of as many bytes, and after them in the high ones

// A float16, whose infinities and NaN are large numbers here.
inline float half_float(uint16_t v) {
  const uint32_t bits = static_cast<uint32_t>(v & 0x7fff) << 13;
  float out;
  std::memcpy(&out, &bits, sizeof out);
  out *= 0x1p112f;
  return v & 0x8000 ? -out : out;
}

// v, of at most 2^15, rounded to nearest even: the last bits of its sum with 1.5 * 2^23.
inline int16_t rounded(float v) {
  v += 12582912.0f;
  uint32_t bits;
  std::memcpy(&bits, &v, sizeof bits);
  return static_cast<int16_t>(bits);
}

// put(i, code * scale - minimum) for inputs [k, k + n) of row r, i counted from k; k and n are multiples of 64.
template <class Put>
inline void widen_row(const twinflow_int4& weight, int64_t inputs, int64_t r, int64_t k, int64_t n, Put&& put) {
  const int64_t first = r * (inputs / weight.group);
  for (int64_t at = k; at < k + n; at += 2 * HALF) {
    float scale[2], minimum[2];
    for (int64_t h = 0; h < 2; ++h) {
      const int64_t group = first + (at + h * HALF) / weight.group;
      scale[h] = half_float(weight.group_scales[group]);
      minimum[h] = weight.group_minimums ? half_float(weight.group_minimums[group]) : 8 * scale[h];
    }
    const uint8_t* bytes = weight.packed + (r * inputs + at) / 2;
#pragma omp simd
    for (int64_t i = 0; i < HALF; ++i) put(at - k + i, static_cast<float>(bytes[i] & 15) * scale[0] - minimum[0]);
#pragma omp simd
    for (int64_t i = 0; i < HALF; ++i)
      put(at - k + HALF + i, static_cast<float>(bytes[i] >> 4) * scale[1] - minimum[1]);
  }
}

inline int int4_error(const twinflow_int4& weight, int64_t rows, int64_t columns, int64_t inputs, bool complete) {
  if (weight.group < HALF || weight.group % HALF || inputs % (2 * HALF) || inputs % weight.group)
    return TWINFLOW_BAD_SHAPE;
  return product_error(rows, columns, inputs, complete && weight.packed && weight.group_scales);
}

int launch_linear_int4(const int8_t* x, const float* x_scales, twinflow_int4 weight, const void* bias, void* out,
                       int64_t rows, int64_t columns, int64_t inputs, twinflow_launch how) {
  const bool complete = x && x_scales && weight.scales && out;
  if (const int error = int4_error(weight, rows, columns, inputs, complete)) return error;
  const auto stage = [=](int64_t c, int64_t k, int64_t n, int16_t* to) {
    widen_row(weight, inputs, c, k, n, [=](int64_t i, float v) { to[i] = rounded(v); });
  };
  return typed(how.dtype, [&](auto t) {
    using T = decltype(t);
    multiply_int8(x, x_scales, weight.scales, static_cast<const T*>(bias), static_cast<T*>(out), rows, columns, inputs,
                  how.threads, stage);
  });
}

int launch_widen_int4(twinflow_int4 weight, void* out, int format, int64_t rows, int64_t inputs, twinflow_launch how) {
  const bool integers = format == TWINFLOW_I8;
  if (const int error = int4_error(weight, rows, rows, inputs, out && (integers || weight.scales))) return error;
  if (how.dtype != TWINFLOW_F32 || !(integers || format == TWINFLOW_STORED)) return TWINFLOW_BAD_DTYPE;
  each_row({1, rows, inputs}, 1, how.threads, [&](int64_t, int64_t, int64_t r) {
    if (integers) {
      int8_t* row = static_cast<int8_t*>(out) + r * inputs;
      widen_row(weight, inputs, r, 0, inputs, [=](int64_t i, float v) { row[i] = static_cast<int8_t>(rounded(v)); });
    } else {
      float* row = static_cast<float*>(out) + r * inputs;
      const float scale = weight.scales[r];
      widen_row(weight, inputs, r, 0, inputs, [=](int64_t i, float v) { row[i] = v * scale; });
    }
  });
  return TWINFLOW_OK;
}

}  // namespace
