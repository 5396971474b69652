// Activations of the feed-forward blocks.
#pragma once

#include "common.h"

namespace {

inline float silu(float v) { return v / (1.0f + fast_exp(-v)); }

// v / 2 * (1 + tanh(u)) = v / (1 + exp(-2u)), without cancellation
inline float gelu(float v) { return v / (1.0f + fast_exp(-1.59576912f * (v + 0.044715f * v * v * v))); }

// An exponential costs about what four elements of a norm do: hence the 4 of `team`.

template <class T>
void swiglu(const T* x, T* out, int64_t rows, int64_t hidden, int threads) {
#pragma omp parallel for num_threads(team(4 * rows * hidden, threads)) schedule(static)
  for (int64_t r = 0; r < rows; ++r) {
    const T *a = x + 2 * r * hidden, *b = a + hidden;
#pragma omp simd
    for (int64_t i = 0; i < hidden; ++i) store(out + r * hidden + i, silu(load(a[i])) * load(b[i]));
  }
}

template <class T>
void gelu_tanh(const T* x, T* out, int64_t n, int threads) {
#pragma omp parallel for simd num_threads(team(4 * n, threads)) schedule(static)
  for (int64_t i = 0; i < n; ++i) store(out + i, gelu(load(x[i])));
}

int c_swiglu(const void* x, void* out, int64_t rows, int64_t hidden, int dtype, int threads) {
  if (const int error = rows_error(1, rows, hidden, x && out)) return error;
  return typed(dtype, [&](auto t) {
    using T = decltype(t);
    swiglu(static_cast<const T*>(x), static_cast<T*>(out), rows, hidden, threads);
  });
}

int c_gelu_tanh(const void* x, void* out, int64_t rows, int64_t width, int dtype, int threads) {
  if (const int error = rows_error(1, rows, width, x && out)) return error;
  return typed(dtype, [&](auto t) {
    using T = decltype(t);
    gelu_tanh(static_cast<const T*>(x), static_cast<T*>(out), rows * width, threads);
  });
}

}  // namespace
