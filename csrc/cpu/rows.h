// Rows of int8 with a scale each: from the op that makes them, and back from the product that reads them.
#pragma once

#include "common.h"
#include "mlp.h"
#include "norm.h"

namespace {

constexpr float INT8_LIMIT = 127.0f, SMALLEST = 1e-12f;

// values[i] = round(value(i) / scale) with scale = max |value| / 127. `value` is called twice per element: what it
// computes is cheaper than a pass over memory. It comes by value: the loop that stores bytes, which may alias anything
// else, would not vectorise. Magnitudes are compared as integers, which puts NaN above all: a row that holds one gets
// it as its scale.
template <class F>
inline void quantize_row(int8_t* values, float* scale, int64_t n, F value) {
  int32_t largest = 0;
#pragma omp simd reduction(max : largest)
  for (int64_t i = 0; i < n; ++i) {
    const float v = value(i);
    int32_t bits;
    std::memcpy(&bits, &v, sizeof bits);
    bits &= 0x7fffffff;
    largest = bits > largest ? bits : largest;
  }
  float top;
  std::memcpy(&top, &largest, sizeof top);
  top = top < SMALLEST ? SMALLEST : top;
  const float factor = INT8_LIMIT / top;
#pragma omp simd
  for (int64_t i = 0; i < n; ++i) {
    float v = std::nearbyint(value(i) * factor);
    v = v > -INT8_LIMIT ? v : -INT8_LIMIT;  // NaN too
    v = v < INT8_LIMIT ? v : INT8_LIMIT;
    values[i] = static_cast<int8_t>(static_cast<int32_t>(v));
  }
  *scale = top / INT8_LIMIT;
}

constexpr int64_t STAGED = 16384;  // floats on the stack

// The same for a value that costs more than a pass over memory in the cache, an exponential: computed once.
template <class F>
inline void quantize_staged_row(int8_t* values, float* scale, int64_t n, F value) {
  if (n > STAGED) return quantize_row(values, scale, n, value);
  float kept[STAGED];
#pragma omp simd
  for (int64_t i = 0; i < n; ++i) kept[i] = value(i);
  const float* row = kept;
  quantize_row(values, scale, n, [=](int64_t i) { return row[i]; });
}

// Layer norm of one row; either of w and b may be null.
template <class T>
inline void quantize_layer_row(const T* x, const float* w, const float* b, int8_t* values, float* scale, int64_t dim,
                               float eps) {
  const Centre row(x, dim, eps);
  const float mean = row.mean, factor = row.factor;
  const auto plain = [=](int64_t i) { return (load(x[i]) - mean) * factor; };
  if (w && b)
    quantize_row(values, scale, dim, [=](int64_t i) { return plain(i) * w[i] + b[i]; });
  else if (w)
    quantize_row(values, scale, dim, [=](int64_t i) { return plain(i) * w[i]; });
  else if (b)
    quantize_row(values, scale, dim, [=](int64_t i) { return plain(i) + b[i]; });
  else
    quantize_row(values, scale, dim, plain);
}

template <class T>
inline void quantize_rms_row(const T* x, const float* w, int8_t* values, float* scale, int64_t dim, float eps) {
  const float factor = inverse_rms(x, dim, eps);
  quantize_row(values, scale, dim, [=](int64_t i) { return load(x[i]) * factor * w[i]; });
}

int c_quantize_rows(const void* x, int64_t x_batch, int64_t x_row, int8_t* values, float* scales, int64_t batch,
                    int64_t seq, int64_t dim, int dtype, int threads) {
  if (const int error = rows_error(batch, seq, dim, x && values && scales)) return error;
  return norm_rows(x, x_batch, x_row, batch, seq, dim, dtype, threads, [&](const auto* row, int64_t, int64_t r) {
    quantize_row(values + r * dim, scales + r, dim, [=](int64_t i) { return load(row[i]); });
  });
}

int c_rms_norm_quantized(const void* x, int64_t x_batch, int64_t x_row, const float* weight, int64_t weight_batch,
                         int8_t* values, float* scales, int64_t batch, int64_t seq, int64_t dim, float eps, int dtype,
                         int threads) {
  if (const int error = rows_error(batch, seq, dim, x && weight && values && scales)) return error;
  const Weights w{weight, weight_batch};
  return norm_rows(x, x_batch, x_row, batch, seq, dim, dtype, threads, [&](const auto* row, int64_t b, int64_t r) {
    quantize_rms_row(row, w.at(b), values + r * dim, scales + r, dim, eps);
  });
}

int c_layer_norm_quantized(const void* x, int64_t x_batch, int64_t x_row, const float* weight, int64_t weight_batch,
                           const float* bias, int64_t bias_batch, int8_t* values, float* scales, int64_t batch,
                           int64_t seq, int64_t dim, float eps, int dtype, int threads) {
  if (const int error = rows_error(batch, seq, dim, x && values && scales)) return error;
  const Weights w{weight, weight_batch}, shift{bias, bias_batch};
  return norm_rows(x, x_batch, x_row, batch, seq, dim, dtype, threads, [&](const auto* row, int64_t b, int64_t r) {
    quantize_layer_row(row, w.at(b), shift.at(b), values + r * dim, scales + r, dim, eps);
  });
}

int c_residual_norm_quantized(const void* x, int64_t x_batch, int64_t x_row, const void* branch, int64_t branch_batch,
                              int64_t branch_row, const float* post, int64_t post_batch, const float* pre,
                              int64_t pre_batch, void* x_out, int8_t* values, float* scales, int64_t batch, int64_t seq,
                              int64_t dim, float eps, int dtype, int threads) {
  if (const int error = rows_error(batch, seq, dim, x && branch && post && pre && x_out && values && scales))
    return error;
  const Weights after{post, post_batch}, before{pre, pre_batch};
  return residual_rows(x, x_batch, x_row, branch, branch_batch, branch_row, x_out, batch, seq, dim, dtype, threads,
                       [&](const auto* old, const auto* add, auto* sum, int64_t b, int64_t r) {
                         add_rms_row(old, add, after.at(b), sum, dim, eps);
                         quantize_rms_row(sum, before.at(b), values + r * dim, scales + r, dim, eps);
                       });
}

int c_residual_layer_norm_quantized(const void* x, int64_t x_batch, int64_t x_row, const void* branch,
                                    int64_t branch_batch, int64_t branch_row, const float* gate, int64_t gate_batch,
                                    const float* weight, int64_t weight_batch, const float* bias, int64_t bias_batch,
                                    void* x_out, int8_t* values, float* scales, int64_t batch, int64_t seq, int64_t dim,
                                    float eps, int dtype, int threads) {
  if (const int error = rows_error(batch, seq, dim, x && branch && x_out && values && scales)) return error;
  const Weights gates{gate, gate_batch}, w{weight, weight_batch}, shift{bias, bias_batch};
  return residual_rows(x, x_batch, x_row, branch, branch_batch, branch_row, x_out, batch, seq, dim, dtype, threads,
                       [&](const auto* old, const auto* add, auto* sum, int64_t b, int64_t r) {
                         add_gated_row(old, add, gates.at(b), sum, dim);
                         quantize_layer_row(sum, w.at(b), shift.at(b), values + r * dim, scales + r, dim, eps);
                       });
}

int c_swiglu_quantized(const void* x, int8_t* values, float* scales, int64_t rows, int64_t hidden, int dtype,
                       int threads) {
  if (const int error = rows_error(1, rows, hidden, x && values && scales)) return error;
  return typed(dtype, [&](auto t) {
    using T = decltype(t);
    each_row(1, rows, 8 * hidden, threads, [&](int64_t, int64_t, int64_t r) {
      const T *a = static_cast<const T*>(x) + 2 * r * hidden, *b = a + hidden;
      quantize_staged_row(values + r * hidden, scales + r, hidden,
                          [=](int64_t i) { return silu(load(a[i])) * load(b[i]); });
    });
  });
}

int c_gelu_tanh_quantized(const void* x, int8_t* values, float* scales, int64_t rows, int64_t width, int dtype,
                          int threads) {
  if (const int error = rows_error(1, rows, width, x && values && scales)) return error;
  return typed(dtype, [&](auto t) {
    using T = decltype(t);
    each_row(1, rows, 8 * width, threads, [&](int64_t, int64_t, int64_t r) {
      const T* row = static_cast<const T*>(x) + r * width;
      quantize_staged_row(values + r * width, scales + r, width, [=](int64_t i) { return gelu(load(row[i])); });
    });
  });
}

template <class T>
inline void dequantize_row(const int32_t* sums, float x_scale, const float* w_scales, const T* bias, T* out,
                           int64_t columns) {
  if (bias) {
#pragma omp simd
    for (int64_t i = 0; i < columns; ++i)
      store(out + i, static_cast<float>(sums[i]) * x_scale * w_scales[i] + load(bias[i]));
    return;
  }
#pragma omp simd
  for (int64_t i = 0; i < columns; ++i) store(out + i, static_cast<float>(sums[i]) * x_scale * w_scales[i]);
}

int c_dequantize(const int32_t* sums, const float* x_scales, const float* w_scales, const void* bias, void* out,
                 int64_t rows, int64_t columns, int dtype, int threads) {
  if (const int error = rows_error(1, rows, columns, sums && x_scales && w_scales && out)) return error;
  return typed(dtype, [&](auto t) {
    using T = decltype(t);
    each_row(1, rows, columns, threads, [&](int64_t, int64_t, int64_t r) {
      dequantize_row(sums + r * columns, x_scales[r], w_scales, static_cast<const T*>(bias),
                     static_cast<T*>(out) + r * columns, columns);
    });
  });
}

}  // namespace
