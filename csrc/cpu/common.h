// What the CPU kernels share: storage types, exp, the choice by dtype. Everything here and in the headers
// beside it lies in an unnamed namespace: kernels.cpp compiles them once per instruction set.
#pragma once

#include <cmath>
#include <cstdint>
#include <cstring>
#include <type_traits>

#include "twinflow_rt.h"

namespace {

struct bf16 {
  uint16_t bits;
};

inline float load(float v) { return v; }
inline float load(bf16 v) {
  const uint32_t wide = static_cast<uint32_t>(v.bits) << 16;
  float out;
  std::memcpy(&out, &wide, sizeof out);
  return out;
}

// v, rounded to nearest even, in the upper half of a word, below it rests; a NaN must not round up into an infinity.
inline uint32_t rounded_bits(float v) {
  uint32_t wide;
  std::memcpy(&wide, &v, sizeof wide);
  return v != v ? wide | 0x400000 : wide + 0x7fff + ((wide >> 16) & 1);
}

inline void store(float* p, float v) { *p = v; }
inline void store(bf16* p, float v) { p->bits = static_cast<uint16_t>(rounded_bits(v) >> 16); }

// What `load` returns after `store`: rounding without the way through memory.
template <class T>
inline float as_stored(float v) {
  if constexpr (sizeof(T) == sizeof(float)) return v;
  const uint32_t bits = rounded_bits(v) & 0xffff0000;
  std::memcpy(&v, &bits, sizeof v);
  return v;
}

// exp by 2^n * polynomial, relative error below 2e-7; branch-free, so that it vectorises. Infinite
// from 88.4 on, NaN stays NaN.
inline float fast_exp(float x) {
  x = x < -87.0f ? -87.0f : x > 89.0f ? 89.0f : x;
  const float n = std::nearbyint(x * 1.44269504f);
  const float r = std::fma(n, 2.12194440e-4f, std::fma(n, -0.693359375f, x));
  float p = 1.3888889e-3f;
  p = std::fma(p, r, 8.3333333e-3f);
  p = std::fma(p, r, 4.1666667e-2f);
  p = std::fma(p, r, 1.6666667e-1f);
  p = std::fma(p, r, 0.5f);
  p = std::fma(p, r, 1.0f);
  p = std::fma(p, r, 1.0f);
  // NaN becomes -127 here, which no conversion to int is defined for; p stays NaN
  const int32_t bits = (static_cast<int32_t>(n > -127.0f ? n : -127.0f) + 127) << 23;
  float scale;
  std::memcpy(&scale, &bits, sizeof scale);
  return p * scale;
}

constexpr int64_t TILE = 128;  // elements staged on the stack, so that each loop sees adjacent data

// Below so many elements a kernel takes a few microseconds, and waking a second thread for it takes longer.
constexpr int64_t SERIAL = 32768;

// How many of `threads` work on a kernel over so many elements.
inline int team(int64_t elements, int threads) { return elements < SERIAL ? 1 : threads; }

// What speaks against a kernel over such rows; complete: whether its pointers are all there.
inline int shape_error(const twinflow_shape& shape, bool complete) {
  if (shape.batch < 0 || shape.seq < 0 || shape.dim < 1) return TWINFLOW_BAD_SHAPE;
  return shape.batch * shape.seq > 0 && !complete ? TWINFLOW_NULL_POINTER : TWINFLOW_OK;
}

template <class F>
int typed(int dtype, F&& run) {
  if (dtype == TWINFLOW_F32) return run(float{}), TWINFLOW_OK;
  if (dtype == TWINFLOW_BF16) return run(bf16{}), TWINFLOW_OK;
  return TWINFLOW_BAD_DTYPE;
}

}  // namespace
