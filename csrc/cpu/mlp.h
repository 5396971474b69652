// Activations of the feed-forward blocks.
#pragma once

#include "rows.h"

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

int launch_swiglu(const void* x, twinflow_out out, int64_t rows, int64_t width, twinflow_launch how) {
  const twinflow_shape shape{1, rows, width};
  if (const int error = out_error(shape, x && complete(out), out)) return error;
  return typed(how.dtype, [&](auto t) {
    using T = decltype(t);
    const T* from = static_cast<const T*>(x);
    if (stored(out)) return swiglu(from, static_cast<T*>(out.data), rows, width, how.threads);
    each_row(shape, 8, how.threads, [&](int64_t, int64_t, int64_t r) {
      const T *a = from + 2 * r * width, *b = a + width;
      quantize_staged_row(out, r, width, [=](int64_t i) { return silu(load(a[i])) * load(b[i]); });
    });
  });
}

int launch_gelu_tanh(const void* x, twinflow_out out, int64_t rows, int64_t width, twinflow_launch how) {
  const twinflow_shape shape{1, rows, width};
  if (const int error = out_error(shape, x && complete(out), out)) return error;
  return typed(how.dtype, [&](auto t) {
    using T = decltype(t);
    const T* from = static_cast<const T*>(x);
    if (stored(out)) return gelu_tanh(from, static_cast<T*>(out.data), rows * width, how.threads);
    each_row(shape, 8, how.threads, [&](int64_t, int64_t, int64_t r) {
      const T* row = from + r * width;
      quantize_staged_row(out, r, width, [=](int64_t i) { return gelu(load(row[i])); });
    });
  });
}

}  // namespace
