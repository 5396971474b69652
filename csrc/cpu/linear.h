// What quantized linear layers read, rows of int8 with a scale each, what becomes of the sums they give, and, for CPUs
// whose vendor's library has none, the product itself.
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

// -- the product: integers are staged as int16, of which compilers sum the products of two in one instruction --------

constexpr int64_t TILE_ROWS = 4, TILE_COLUMNS = 3;                            // whose sums stay in registers
constexpr int64_t BLOCK_ROWS = 256, BLOCK_COLUMNS = 48, BLOCK_INPUTS = 1024;  // what stays in the cache

// sums[a, b] += x[a] . w[b], of n integers; rows of x and w are BLOCK_INPUTS apart, those of sums BLOCK_COLUMNS. Not
// inlined, or the sums leave their registers; not `omp simd`, which hides that these are dot products.
[[gnu::noinline]] void add_tile(const int16_t* x, const int16_t* w, int64_t n, int32_t* sums) {
  int32_t tile[TILE_ROWS * TILE_COLUMNS] = {};
  for (int64_t i = 0; i < n; ++i)
    for (int64_t a = 0; a < TILE_ROWS; ++a)
      for (int64_t b = 0; b < TILE_COLUMNS; ++b)
        tile[a * TILE_COLUMNS + b] += x[a * BLOCK_INPUTS + i] * w[b * BLOCK_INPUTS + i];
  for (int64_t a = 0; a < TILE_ROWS; ++a)
    for (int64_t b = 0; b < TILE_COLUMNS; ++b) sums[a * BLOCK_COLUMNS + b] += tile[a * TILE_COLUMNS + b];
}

inline void stage_row(const int8_t* row, int16_t* to, int64_t n) {
#pragma omp simd
  for (int64_t i = 0; i < n; ++i) to[i] = row[i];  // NOLINT(bugprone-signed-char-misuse): a number
}

// Sums, rows BLOCK_COLUMNS apart, of rows of x, `inputs` apart, with rows of a weight, from `first` on: stage(c, k, n,
// to) writes inputs [k, k + n) of its row c.
template <class Stage>
inline void multiply_block(const int8_t* x, int64_t rows, int64_t first, int64_t columns, int64_t inputs,
                           const Stage& stage, int32_t* sums) {
  int16_t w[BLOCK_COLUMNS * BLOCK_INPUTS], few[TILE_ROWS * BLOCK_INPUTS];
  for (int64_t k = 0; k < inputs; k += BLOCK_INPUTS) {
    const int64_t n = inputs - k < BLOCK_INPUTS ? inputs - k : BLOCK_INPUTS;
    for (int64_t c = 0; c < columns; ++c) stage(first + c, k, n, w + c * BLOCK_INPUTS);
    for (int64_t c = columns; c % TILE_COLUMNS; ++c) std::memset(w + c * BLOCK_INPUTS, 0, n * sizeof *w);
    for (int64_t r = 0; r < rows; r += TILE_ROWS) {
      for (int64_t a = 0; a < TILE_ROWS; ++a)  // beyond the last row: any, whose sums nobody reads
        stage_row(x + (r + a < rows ? r + a : r) * inputs + k, few + a * BLOCK_INPUTS, n);
      for (int64_t c = 0; c < columns; c += TILE_COLUMNS)
        add_tile(few, w + c * BLOCK_INPUTS, n, sums + r * BLOCK_COLUMNS + c);
    }
  }
}

// The product with a weight [columns, inputs] that `stage` writes, as above.
template <class T, class Stage>
void multiply_int8(const int8_t* x, const float* x_scales, const float* w_scales, const T* bias, T* out, int64_t rows,
                   int64_t columns, int64_t inputs, int threads, const Stage& stage) {
  const int64_t high = (rows + BLOCK_ROWS - 1) / BLOCK_ROWS, wide = (columns + BLOCK_COLUMNS - 1) / BLOCK_COLUMNS;
#pragma omp parallel for num_threads(team(rows * columns * (inputs / 32 + 1), threads)) schedule(dynamic)
  for (int64_t block = 0; block < high * wide; ++block) {
    const int64_t r = block % high * BLOCK_ROWS, c = block / high * BLOCK_COLUMNS;
    const int64_t few = rows - r < BLOCK_ROWS ? rows - r : BLOCK_ROWS;
    const int64_t n = columns - c < BLOCK_COLUMNS ? columns - c : BLOCK_COLUMNS;
    int32_t sums[BLOCK_ROWS * BLOCK_COLUMNS] = {};
    multiply_block(x + r * inputs, few, c, n, inputs, stage, sums);
    for (int64_t i = 0; i < few; ++i)
      dequantize_row(sums + i * BLOCK_COLUMNS, x_scales[r + i], w_scales + c, bias ? bias + c : nullptr,
                     out + (r + i) * columns + c, n);
  }
}

inline int product_error(int64_t rows, int64_t columns, int64_t inputs, bool complete) {
  if (rows < 0 || columns < 0 || inputs < 1) return TWINFLOW_BAD_SHAPE;
  return rows > 0 && columns > 0 && !complete ? TWINFLOW_NULL_POINTER : TWINFLOW_OK;
}

int launch_linear_int8(const int8_t* x, const float* x_scales, const int8_t* weight, const float* w_scales,
                       const void* bias, void* out, int64_t rows, int64_t columns, int64_t inputs,
                       twinflow_launch how) {
  if (const int error = product_error(rows, columns, inputs, x && x_scales && weight && w_scales && out)) return error;
  const auto stage = [=](int64_t c, int64_t k, int64_t n, int16_t* to) { stage_row(weight + c * inputs + k, to, n); };
  return typed(how.dtype, [&](auto t) {
    using T = decltype(t);
    multiply_int8(x, x_scales, w_scales, static_cast<const T*>(bias), static_cast<T*>(out), rows, columns, inputs,
                  how.threads, stage);
  });
}

}  // namespace
