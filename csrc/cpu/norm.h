// The norm family, one row at a time.
#pragma once

#include "common.h"

namespace {

template <class T>
inline float inverse_rms(const T* x, int64_t dim, float eps) {
  float sum = 0;
#pragma omp simd reduction(+ : sum)
  for (int64_t i = 0; i < dim; ++i) {
    const float v = load(x[i]);
    sum += v * v;
  }
  return 1.0f / std::sqrt(sum / static_cast<float>(dim) + eps);
}

template <class T>
inline void scale_row(const T* x, const float* weight, T* out, int64_t dim, float factor) {
#pragma omp simd
  for (int64_t i = 0; i < dim; ++i) store(out + i, load(x[i]) * factor * weight[i]);
}

// out = (x - mean) * factor * weight + bias; either of weight and bias may be null.
template <class T>
inline void scale_centered(const T* x, const float* weight, const float* bias, T* out, int64_t dim, float mean,
                           float factor) {
  for (int64_t start = 0; start < dim; start += TILE) {
    const int64_t n = dim - start < TILE ? dim - start : TILE;
    float v[TILE];
#pragma omp simd
    for (int64_t i = 0; i < n; ++i) v[i] = (load(x[start + i]) - mean) * factor;
    if (weight)
#pragma omp simd
      for (int64_t i = 0; i < n; ++i) v[i] *= weight[start + i];
    if (bias)
#pragma omp simd
      for (int64_t i = 0; i < n; ++i) v[i] += bias[start + i];
#pragma omp simd
    for (int64_t i = 0; i < n; ++i) store(out + start + i, v[i]);
  }
}

// Layer norm of one row; the variance is of the centred row.
template <class T>
inline void layer_row(const T* x, const float* weight, const float* bias, T* out, int64_t dim, float eps) {
  float sum = 0, squares = 0;
#pragma omp simd reduction(+ : sum)
  for (int64_t i = 0; i < dim; ++i) sum += load(x[i]);
  const float mean = sum / static_cast<float>(dim);
#pragma omp simd reduction(+ : squares)
  for (int64_t i = 0; i < dim; ++i) {
    const float v = load(x[i]) - mean;
    squares += v * v;
  }
  scale_centered(x, weight, bias, out, dim, mean, 1.0f / std::sqrt(squares / static_cast<float>(dim) + eps));
}

// sum = x + rms_norm(branch, weight).
template <class T>
inline void add_rms_row(const T* x, const T* branch, const float* weight, T* sum, int64_t dim, float eps) {
  const float factor = inverse_rms(branch, dim, eps);
#pragma omp simd
  for (int64_t i = 0; i < dim; ++i) store(sum + i, load(x[i]) + load(branch[i]) * factor * weight[i]);
}

// sum = x + gate * branch; gate may be null.
template <class T>
inline void add_gated_row(const T* x, const T* branch, const float* gate, T* sum, int64_t dim) {
  if (gate)  // NOLINT(bugprone-branch-clone): the check does not look into directives
#pragma omp simd
    for (int64_t i = 0; i < dim; ++i) store(sum + i, load(x[i]) + load(branch[i]) * gate[i]);
  else
#pragma omp simd
    for (int64_t i = 0; i < dim; ++i) store(sum + i, load(x[i]) + load(branch[i]));
}

// The rows of a tensor and the weights of a sample, as twinflow_rt.h addresses them.
template <class T>
struct Rows {
  T* data;
  int64_t batch, row;
  T* at(int64_t b, int64_t s) const { return data + b * batch + s * row; }
};

struct Weights {
  const float* data;
  int64_t batch;
  const float* at(int64_t b) const { return data ? data + b * batch : nullptr; }
};

// visit(b, s, r) for every row r = b * seq + s.
template <class F>
void each_row(int64_t batch, int64_t seq, int64_t dim, int threads, F&& visit) {
#pragma omp parallel for num_threads(team(batch * seq * dim, threads)) schedule(static)
  for (int64_t r = 0; r < batch * seq; ++r) visit(r / seq, r % seq, r);
}

int norm_error(int64_t batch, int64_t seq, int64_t dim, bool complete) {
  if (batch < 0 || seq < 0 || dim < 1) return TWINFLOW_BAD_SHAPE;
  return batch * seq && !complete ? TWINFLOW_NULL_POINTER : TWINFLOW_OK;
}

int c_rms_norm(const void* x, int64_t x_batch, int64_t x_row, const float* weight, int64_t weight_batch, void* out,
               int64_t batch, int64_t seq, int64_t dim, float eps, int dtype, int threads) {
  if (const int error = norm_error(batch, seq, dim, x && weight && out)) return error;
  return typed(dtype, [&](auto t) {
    using T = decltype(t);
    const Rows<const T> rows{static_cast<const T*>(x), x_batch, x_row};
    const Weights w{weight, weight_batch};
    each_row(batch, seq, dim, threads, [&](int64_t b, int64_t s, int64_t r) {
      const T* row = rows.at(b, s);
      scale_row(row, w.at(b), static_cast<T*>(out) + r * dim, dim, inverse_rms(row, dim, eps));
    });
  });
}

int c_layer_norm(const void* x, int64_t x_batch, int64_t x_row, const float* weight, int64_t weight_batch,
                 const float* bias, int64_t bias_batch, void* out, int64_t batch, int64_t seq, int64_t dim, float eps,
                 int dtype, int threads) {
  if (const int error = norm_error(batch, seq, dim, x && out)) return error;
  return typed(dtype, [&](auto t) {
    using T = decltype(t);
    const Rows<const T> rows{static_cast<const T*>(x), x_batch, x_row};
    const Weights w{weight, weight_batch}, shift{bias, bias_batch};
    each_row(batch, seq, dim, threads, [&](int64_t b, int64_t s, int64_t r) {
      layer_row(rows.at(b, s), w.at(b), shift.at(b), static_cast<T*>(out) + r * dim, dim, eps);
    });
  });
}

int c_residual_norm(const void* x, int64_t x_batch, int64_t x_row, const void* branch, int64_t branch_batch,
                    int64_t branch_row, const float* post, int64_t post_batch, const float* pre, int64_t pre_batch,
                    void* x_out, void* h_out, int64_t batch, int64_t seq, int64_t dim, float eps, int dtype,
                    int threads) {
  if (const int error = norm_error(batch, seq, dim, x && branch && post && x_out && !pre == !h_out)) return error;
  return typed(dtype, [&](auto t) {
    using T = decltype(t);
    const Rows<const T> old{static_cast<const T*>(x), x_batch, x_row};
    const Rows<const T> add{static_cast<const T*>(branch), branch_batch, branch_row};
    const Weights after{post, post_batch}, before{pre, pre_batch};
    each_row(batch, seq, dim, threads, [&](int64_t b, int64_t s, int64_t r) {
      T* sum = static_cast<T*>(x_out) + r * dim;
      add_rms_row(old.at(b, s), add.at(b, s), after.at(b), sum, dim, eps);
      if (h_out) scale_row(sum, before.at(b), static_cast<T*>(h_out) + r * dim, dim, inverse_rms(sum, dim, eps));
    });
  });
}

int c_residual_layer_norm(const void* x, int64_t x_batch, int64_t x_row, const void* branch, int64_t branch_batch,
                          int64_t branch_row, const float* gate, int64_t gate_batch, const float* weight,
                          int64_t weight_batch, const float* bias, int64_t bias_batch, void* x_out, void* h_out,
                          int64_t batch, int64_t seq, int64_t dim, float eps, int dtype, int threads) {
  if (const int error = norm_error(batch, seq, dim, x && branch && x_out && h_out)) return error;
  return typed(dtype, [&](auto t) {
    using T = decltype(t);
    const Rows<const T> old{static_cast<const T*>(x), x_batch, x_row};
    const Rows<const T> add{static_cast<const T*>(branch), branch_batch, branch_row};
    const Weights gates{gate, gate_batch}, w{weight, weight_batch}, shift{bias, bias_batch};
    each_row(batch, seq, dim, threads, [&](int64_t b, int64_t s, int64_t r) {
      T* sum = static_cast<T*>(x_out) + r * dim;
      add_gated_row(old.at(b, s), add.at(b, s), gates.at(b), sum, dim);
      layer_row(sum, w.at(b), shift.at(b), static_cast<T*>(h_out) + r * dim, dim, eps);
    });
  });
}

}  // namespace
