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

// A row's mean, and 1 / sqrt(variance + eps) of the centred row.
struct Centre {
  float mean, factor;

  template <class T>
  Centre(const T* x, int64_t dim, float eps) {
    float sum = 0, squares = 0;
#pragma omp simd reduction(+ : sum)
    for (int64_t i = 0; i < dim; ++i) sum += load(x[i]);
    mean = sum / static_cast<float>(dim);
    const float m = mean;
#pragma omp simd reduction(+ : squares)
    for (int64_t i = 0; i < dim; ++i) {
      const float v = load(x[i]) - m;
      squares += v * v;
    }
    factor = 1.0f / std::sqrt(squares / static_cast<float>(dim) + eps);
  }
};

// Layer norm of one row.
template <class T>
inline void layer_row(const T* x, const float* weight, const float* bias, T* out, int64_t dim, float eps) {
  const Centre row(x, dim, eps);
  scale_centered(x, weight, bias, out, dim, row.mean, row.factor);
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

// visit(row, b, r) for every row of x, of its dtype.
template <class F>
int norm_rows(const void* x, int64_t x_batch, int64_t x_row, int64_t batch, int64_t seq, int64_t dim, int dtype,
              int threads, F&& visit) {
  return typed(dtype, [&](auto t) {
    const Rows<const decltype(t)> rows{static_cast<const decltype(t)*>(x), x_batch, x_row};
    each_row(batch, seq, dim, threads, [&](int64_t b, int64_t s, int64_t r) { visit(rows.at(b, s), b, r); });
  });
}

// visit(row of x, row of branch, row of x_out, b, r) for all of them.
template <class F>
int residual_rows(const void* x, int64_t x_batch, int64_t x_row, const void* branch, int64_t branch_batch,
                  int64_t branch_row, void* x_out, int64_t batch, int64_t seq, int64_t dim, int dtype, int threads,
                  F&& visit) {
  return typed(dtype, [&](auto t) {
    using T = decltype(t);
    const Rows<const T> old{static_cast<const T*>(x), x_batch, x_row};
    const Rows<const T> add{static_cast<const T*>(branch), branch_batch, branch_row};
    each_row(batch, seq, dim, threads, [&](int64_t b, int64_t s, int64_t r) {
      visit(old.at(b, s), add.at(b, s), static_cast<T*>(x_out) + r * dim, b, r);
    });
  });
}

// Row r of a contiguous tensor, of the dtype of `like`.
template <class T>
inline T* row_like(const T* /*like*/, void* data, int64_t r, int64_t dim) {
  return static_cast<T*>(data) + r * dim;
}

int c_rms_norm(const void* x, int64_t x_batch, int64_t x_row, const float* weight, int64_t weight_batch, void* out,
               int64_t batch, int64_t seq, int64_t dim, float eps, int dtype, int threads) {
  if (const int error = rows_error(batch, seq, dim, x && weight && out)) return error;
  const Weights w{weight, weight_batch};
  return norm_rows(x, x_batch, x_row, batch, seq, dim, dtype, threads, [&](const auto* row, int64_t b, int64_t r) {
    scale_row(row, w.at(b), row_like(row, out, r, dim), dim, inverse_rms(row, dim, eps));
  });
}

int c_layer_norm(const void* x, int64_t x_batch, int64_t x_row, const float* weight, int64_t weight_batch,
                 const float* bias, int64_t bias_batch, void* out, int64_t batch, int64_t seq, int64_t dim, float eps,
                 int dtype, int threads) {
  if (const int error = rows_error(batch, seq, dim, x && out)) return error;
  const Weights w{weight, weight_batch}, shift{bias, bias_batch};
  return norm_rows(x, x_batch, x_row, batch, seq, dim, dtype, threads, [&](const auto* row, int64_t b, int64_t r) {
    layer_row(row, w.at(b), shift.at(b), row_like(row, out, r, dim), dim, eps);
  });
}

int c_residual_norm(const void* x, int64_t x_batch, int64_t x_row, const void* branch, int64_t branch_batch,
                    int64_t branch_row, const float* post, int64_t post_batch, const float* pre, int64_t pre_batch,
                    void* x_out, void* h_out, int64_t batch, int64_t seq, int64_t dim, float eps, int dtype,
                    int threads) {
  if (const int error = rows_error(batch, seq, dim, x && branch && post && x_out && !pre == !h_out)) return error;
  const Weights after{post, post_batch}, before{pre, pre_batch};
  return residual_rows(x, x_batch, x_row, branch, branch_batch, branch_row, x_out, batch, seq, dim, dtype, threads,
                       [&](const auto* old, const auto* add, auto* sum, int64_t b, int64_t r) {
                         add_rms_row(old, add, after.at(b), sum, dim, eps);
                         if (h_out)
                           scale_row(sum, before.at(b), row_like(sum, h_out, r, dim), dim, inverse_rms(sum, dim, eps));
                       });
}

int c_residual_layer_norm(const void* x, int64_t x_batch, int64_t x_row, const void* branch, int64_t branch_batch,
                          int64_t branch_row, const float* gate, int64_t gate_batch, const float* weight,
                          int64_t weight_batch, const float* bias, int64_t bias_batch, void* x_out, void* h_out,
                          int64_t batch, int64_t seq, int64_t dim, float eps, int dtype, int threads) {
  if (const int error = rows_error(batch, seq, dim, x && branch && x_out && h_out)) return error;
  const Weights gates{gate, gate_batch}, w{weight, weight_batch}, shift{bias, bias_batch};
  return residual_rows(x, x_batch, x_row, branch, branch_batch, branch_row, x_out, batch, seq, dim, dtype, threads,
                       [&](const auto* old, const auto* add, auto* sum, int64_t b, int64_t r) {
                         add_gated_row(old, add, gates.at(b), sum, dim);
                         layer_row(sum, w.at(b), shift.at(b), row_like(sum, h_out, r, dim), dim, eps);
                       });
}

}  // namespace
