// Rows of strided tensors: where they are, and where they go, in the storage's dtype or as int8 with a scale each.
#pragma once

#include "common.h"

namespace {

// Row s of sample b; the weights of sample b, or null.
template <class T>
inline T* at(const twinflow_rows& rows, int64_t b, int64_t s) {
  return static_cast<T*>(rows.data) + b * rows.batch + s * rows.row;
}

inline const float* at(const twinflow_weights& weights, int64_t b) {
  return weights.data ? weights.data + b * weights.batch : nullptr;
}

// Row r of contiguous ones, of the dtype of `like`.
template <class T>
inline T* row_like(const T* /*like*/, void* data, int64_t r, int64_t dim) {
  return static_cast<T*>(data) + r * dim;
}

inline bool stored(const twinflow_out& out) { return out.format == TWINFLOW_STORED; }
inline bool complete(const twinflow_out& out) { return out.data && (stored(out) || out.scales); }

// What speaks against a kernel that writes such rows.
inline int out_error(const twinflow_shape& shape, bool all, const twinflow_out& out) {
  if (const int error = shape_error(shape, all)) return error;
  return stored(out) || out.format == TWINFLOW_I8 ? TWINFLOW_OK : TWINFLOW_BAD_DTYPE;
}

constexpr float INT8_LIMIT = 127.0f, SMALLEST = 1e-12f;

// Row r of out, n wide: round(value(i) / scale) with scale = max |value| / 127. `value` is called twice per element:
// what it computes is cheaper than a pass over memory. It comes by value: the loop that stores bytes, which may alias
// anything else, would not vectorise. Magnitudes are compared as integers, which puts NaN above all: a row that holds
// one gets it as its scale.
template <class F>
inline void quantize_row(const twinflow_out& out, int64_t r, int64_t n, F value) {
  int8_t* values = static_cast<int8_t*>(out.data) + r * n;
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
  out.scales[r] = top / INT8_LIMIT;
}

constexpr int64_t STAGED = 16384;  // floats on the stack

// The same for a value that costs more than a pass over memory in the cache, an exponential: computed once.
template <class F>
inline void quantize_staged_row(const twinflow_out& out, int64_t r, int64_t n, F value) {
  if (n > STAGED) return quantize_row(out, r, n, value);
  float kept[STAGED];
#pragma omp simd
  for (int64_t i = 0; i < n; ++i) kept[i] = value(i);
  const float* row = kept;
  quantize_row(out, r, n, [=](int64_t i) { return row[i]; });
}

// visit(b, s, r) for every row r = b * seq + s; an element costs a thread as much as `cost` of a norm.
template <class F>
void each_row(const twinflow_shape& shape, int64_t cost, int threads, F&& visit) {
#pragma omp parallel for num_threads(team(shape.batch* shape.seq* shape.dim* cost, threads)) schedule(static)
  for (int64_t r = 0; r < shape.batch * shape.seq; ++r) visit(r / shape.seq, r % shape.seq, r);
}

}  // namespace
