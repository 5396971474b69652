// QK RMSNorm + rotary embedding, one head at a time.
#pragma once

#include "common.h"
#include "norm.h"

namespace {

// One head: out = rotate(round(rms_norm(x))); the reference networks round between norm and rotation.
template <class T>
inline void norm_rotate(const T* x, T* out, const float* weight, const float* cos, const float* sin, int64_t dim,
                        float eps) {
  const float factor = inverse_rms(x, dim, eps);
  for (int64_t start = 0; start < dim; start += TILE) {
    const int64_t n = dim - start < TILE ? dim - start : TILE;
    T rounded[TILE];
    float v[TILE], turned[TILE];
    scale_row(x + start, weight + start, rounded, n, factor);
#pragma omp simd
    for (int64_t i = 0; i < n; ++i) v[i] = load(rounded[i]);
    const float *c = cos + start / 2, *s = sin + start / 2;
#pragma omp simd
    for (int64_t i = 0; i < n / 2; ++i) {
      turned[2 * i] = v[2 * i] * c[i] - v[2 * i + 1] * s[i];
      turned[2 * i + 1] = v[2 * i] * s[i] + v[2 * i + 1] * c[i];
    }
#pragma omp simd
    for (int64_t i = 0; i < n; ++i) store(out + start + i, turned[i]);
  }
}

template <class T>
void qk_norm_rope(const T* qkv, int64_t qkv_batch, int64_t qkv_row, int64_t qkv_part, T* out, int64_t out_batch,
                  int64_t out_row, int64_t out_part, const float* q_weight, const float* k_weight, const float* cos,
                  const float* sin, int64_t angle_batch, int64_t angle_row, int64_t batch, int64_t seq, int64_t heads,
                  int64_t dim, int parts, float eps, int threads) {
#pragma omp parallel for num_threads(threads) schedule(static)
  for (int64_t r = 0; r < batch * seq; ++r) {
    const int64_t b = r / seq, s = r % seq, angle = b * angle_batch + s * angle_row;
    const T* from = qkv + b * qkv_batch + s * qkv_row;
    T* to = out + b * out_batch + s * out_row;
    for (int p = 0; p < 2; ++p)
      for (int64_t h = 0; h < heads * dim; h += dim)
        norm_rotate(from + p * qkv_part + h, to + p * out_part + h, p ? k_weight : q_weight, cos + angle, sin + angle,
                    dim, eps);
    if (parts == 3) std::memmove(to + 2 * out_part, from + 2 * qkv_part, heads * dim * sizeof(T));
  }
}

int c_qk_norm_rope(const void* qkv, int64_t qkv_batch, int64_t qkv_row, int64_t qkv_part, void* out, int64_t out_batch,
                   int64_t out_row, int64_t out_part, const float* q_weight, const float* k_weight, const float* cos,
                   const float* sin, int64_t angle_batch, int64_t angle_row, int64_t batch, int64_t seq, int64_t heads,
                   int64_t dim, int parts, float eps, int dtype, int threads) {
  if (batch < 0 || seq < 0 || heads < 1 || dim < 2 || dim % 2 || parts < 2 || parts > 3) return TWINFLOW_BAD_SHAPE;
  if (batch * seq && !(qkv && out && q_weight && k_weight && cos && sin)) return TWINFLOW_NULL_POINTER;
  return typed(dtype, [&](auto t) {
    using T = decltype(t);
    qk_norm_rope(static_cast<const T*>(qkv), qkv_batch, qkv_row, qkv_part, static_cast<T*>(out), out_batch, out_row,
                 out_part, q_weight, k_weight, cos, sin, angle_batch, angle_row, batch, seq, heads, dim, parts, eps,
                 threads);
  });
}

}  // namespace
