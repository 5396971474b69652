// What quantized linear layers read, rows of int8 with a scale each, and what becomes of the sums they give.
#pragma once

#include "norm.h"
#include "rows.h"

namespace {

int launch_quantize_rows(twinflow_rows x, twinflow_out out, twinflow_shape shape, twinflow_launch how) {
  if (const int error = out_error(shape, x.data && complete(out), out)) return error;
  if (stored(out)) return TWINFLOW_BAD_DTYPE;
  return norm_rows(x, shape, how, [&](const auto* row, int64_t, int64_t r) {
    quantize_row(out, r, shape.dim, [=](int64_t i) { return load(row[i]); });
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

int launch_dequantize(const int32_t* sums, const float* x_scales, const float* w_scales, const void* bias, void* out,
                      int64_t rows, int64_t columns, twinflow_launch how) {
  const twinflow_shape shape{1, rows, columns};
  if (const int error = shape_error(shape, sums && x_scales && w_scales && out)) return error;
  return typed(how.dtype, [&](auto t) {
    using T = decltype(t);
    each_row(shape, 1, how.threads, [&](int64_t, int64_t, int64_t r) {
      dequantize_row(sums + r * columns, x_scales[r], w_scales, static_cast<const T*>(bias),
                     static_cast<T*>(out) + r * columns, columns);
    });
  });
}

}  // namespace
