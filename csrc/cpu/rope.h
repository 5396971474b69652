// QK RMSNorm + rotary embedding, one head at a time.
#pragma once

#include "norm.h"

namespace {

// A tile of a token's angles, an entry per element: rotated, x[i] becomes x[i] * along[i] + x[i ^ 1] * across[i].
struct Turn {
  float along[TILE], across[TILE];

  void set(const float* cos, const float* sin, int64_t n) {
#pragma omp simd
    for (int64_t i = 0; i < n / 2; ++i) {
      along[2 * i] = along[2 * i + 1] = cos[i];
      across[2 * i] = -sin[i];
      across[2 * i + 1] = sin[i];
    }
  }
};

// A tile of one head: out = rotate(round(x * factor * weight)); the reference networks round before the rotation.
template <class T>
inline void norm_rotate(const T* x, T* out, const float* weight, const Turn& turn, int64_t n, float factor) {
  float v[TILE], other[TILE];
#pragma omp simd
  for (int64_t i = 0; i < n; ++i) v[i] = as_stored<T>(load(x[i]) * factor * weight[i]);
#pragma omp simd
  for (int64_t i = 0; i < n / 2; ++i) {
    other[2 * i] = v[2 * i + 1];
    other[2 * i + 1] = v[2 * i];
  }
#pragma omp simd
  for (int64_t i = 0; i < n; ++i) store(out + i, v[i] * turn.along[i] + other[i] * turn.across[i]);
}

// All heads of one token's q or k. With the head dim a constant, its short loops become straight code.
template <class T>
inline void norm_rotate_heads(const T* from, T* to, const float* weight, const float* cos, const float* sin,
                              int64_t heads, int64_t dim, float eps) {
  Turn turn;
  if (dim <= TILE) turn.set(cos, sin, dim);
  for (int64_t h = 0; h < heads * dim; h += dim) {
    const float factor = inverse_rms(from + h, dim, eps);
    if (dim <= TILE) {
      norm_rotate(from + h, to + h, weight, turn, dim, factor);
      continue;
    }
    for (int64_t start = 0; start < dim; start += TILE) {
      const int64_t n = dim - start < TILE ? dim - start : TILE;
      turn.set(cos + start / 2, sin + start / 2, n);
      norm_rotate(from + h + start, to + h + start, weight + start, turn, n, factor);
    }
  }
}

template <class T>
void qk_norm_rope(const twinflow_rows& qkv, int64_t qkv_part, const twinflow_rows& out, int64_t out_part,
                  const float* q_weight, const float* k_weight, const twinflow_angles& angles,
                  const twinflow_shape& shape, int64_t heads, int parts, float eps, int threads) {
  const int64_t seq = shape.seq, dim = shape.dim;
#pragma omp parallel for num_threads(team(3 * shape.batch * seq * heads * dim, threads)) schedule(static)
  for (int64_t r = 0; r < shape.batch * seq; ++r) {
    const int64_t b = r / seq, s = r % seq, angle = b * angles.batch + s * angles.row;
    const T* from = at<const T>(qkv, b, s);
    T* to = at<T>(out, b, s);
    for (int p = 0; p < 2; ++p) {
      const T* x = from + p * qkv_part;
      T* y = to + p * out_part;
      const float *weight = p ? k_weight : q_weight, *c = angles.cos + angle, *n = angles.sin + angle;
      switch (dim) {  // of the models here
        case 24: norm_rotate_heads(x, y, weight, c, n, heads, 24, eps); break;
        case 64: norm_rotate_heads(x, y, weight, c, n, heads, 64, eps); break;
        case 128: norm_rotate_heads(x, y, weight, c, n, heads, 128, eps); break;
        default: norm_rotate_heads(x, y, weight, c, n, heads, dim, eps);
      }
    }
    if (parts == 3) std::memmove(to + 2 * out_part, from + 2 * qkv_part, heads * dim * sizeof(T));
  }
}

// Heads whose halves are the pairs, each behind its norm where there is a weight: (x[i] + j x[i + dim/2]) * (cos[i] +
// j sin[i]). The norm is rounded as above.
template <class T>
inline void norm_rotate_halves(T* from, const float* weight, const float* cos, const float* sin, int64_t heads,
                               int64_t dim, float eps) {
  const int64_t half = dim / 2;
  for (T *x = from, *y = from + half; x < from + heads * dim; x += dim, y += dim) {
    const float factor = weight ? inverse_rms(x, dim, eps) : 1;
#pragma omp simd
    for (int64_t i = 0; i < half; ++i) {
      float a = load(x[i]), b = load(y[i]);
      if (weight) {
        a = as_stored<T>(a * factor * weight[i]);
        b = as_stored<T>(b * factor * weight[half + i]);
      }
      store(x + i, a * cos[i] - b * sin[i]);
      store(y + i, b * cos[i] + a * sin[i]);
    }
  }
}

template <class T>
void grouped_qk_norm_rope(const twinflow_rows& qkv, const float* q_weight, const float* k_weight,
                          const twinflow_angles& angles, const twinflow_shape& shape, int64_t heads, int64_t kv_heads,
                          float eps, int threads) {
  const int64_t seq = shape.seq, dim = shape.dim;
#pragma omp parallel for num_threads(team(2 * shape.batch * seq * (heads + kv_heads) * dim, threads)) schedule(static)
  for (int64_t r = 0; r < shape.batch * seq; ++r) {
    const int64_t b = r / seq, s = r % seq, angle = b * angles.batch + s * angles.row;
    T* token = at<T>(qkv, b, s);
    for (int p = 0; p < 2; ++p) {
      T* x = p ? token + heads * dim : token;
      const float *weight = p ? k_weight : q_weight, *c = angles.cos + angle, *n = angles.sin + angle;
      const int64_t count = p ? kv_heads : heads;
      switch (dim) {  // of the models here
        case 24: norm_rotate_halves(x, weight, c, n, count, 24, eps); break;
        case 128: norm_rotate_halves(x, weight, c, n, count, 128, eps); break;
        default: norm_rotate_halves(x, weight, c, n, count, dim, eps);
      }
    }
  }
}

int launch_qk_norm_rope(twinflow_rows qkv, int64_t qkv_part, twinflow_rows out, int64_t out_part, const float* q_weight,
                        const float* k_weight, twinflow_angles angles, twinflow_shape shape, int64_t heads, int parts,
                        float eps, twinflow_launch how) {
  if (heads < 1 || shape.dim % 2 || parts < 2 || parts > 3) return TWINFLOW_BAD_SHAPE;
  const bool complete = qkv.data && out.data && q_weight && k_weight && angles.cos && angles.sin;
  if (const int error = shape_error(shape, complete)) return error;
  return typed(how.dtype, [&](auto t) {
    qk_norm_rope<decltype(t)>(qkv, qkv_part, out, out_part, q_weight, k_weight, angles, shape, heads, parts, eps,
                              how.threads);
  });
}

int launch_grouped_qk_norm_rope(twinflow_rows qkv, const float* q_weight, const float* k_weight, twinflow_angles angles,
                                twinflow_shape shape, int64_t heads, int64_t kv_heads, float eps, twinflow_launch how) {
  if (heads < 1 || kv_heads < 1 || shape.dim % 2) return TWINFLOW_BAD_SHAPE;
  if (const int error = shape_error(shape, qkv.data && angles.cos && angles.sin)) return error;
  return typed(how.dtype, [&](auto t) {
    grouped_qk_norm_rope<decltype(t)>(qkv, q_weight, k_weight, angles, shape, heads, kv_heads, eps, how.threads);
  });
}

}  // namespace
