// CPU kernels. Compiled once per instruction set (TWINFLOW_ISA names the table), so the loops are
// plain C++ that the compiler vectorises; `omp simd` allows it to reorder the sums.

#include <cmath>
#include <cstring>

#include "kernels.h"

namespace {

struct bf16 {
  uint16_t bits;
};

inline float load(float v) { return v; }
inline float load(bf16 v) {
  const uint32_t wide = static_cast<uint32_t>(v.bits) << 16;
  float out;
  std::memcpy(&out, &wide, sizeof out);
  return out;
}

inline void store(float* p, float v) { *p = v; }
inline void store(bf16* p, float v) {
  uint32_t wide;
  std::memcpy(&wide, &v, sizeof wide);
  // to nearest even; a NaN must not round up into an infinity
  const uint32_t rounded = (wide + 0x7fff + ((wide >> 16) & 1)) >> 16;
  p->bits = static_cast<uint16_t>((wide & 0x7fffffff) > 0x7f800000 ? (wide >> 16) | 0x40 : rounded);
}

// exp by 2^n * polynomial, relative error below 2e-7; branch-free, so that it vectorises. Infinite
// from 88.4 on, NaN stays NaN.
inline float fast_exp(float x) {
  x = x < -87.0f ? -87.0f : x > 89.0f ? 89.0f : x;
  const float n = std::nearbyint(x * 1.44269504f);
  const float r = std::fma(n, 2.12194440e-4f, std::fma(n, -0.693359375f, x));
  float p = 1.3888889e-3f;
  p = std::fma(p, r, 8.3333333e-3f);
  p = std::fma(p, r, 4.1666667e-2f);
  p = std::fma(p, r, 1.6666667e-1f);
  p = std::fma(p, r, 0.5f);
  p = std::fma(p, r, 1.0f);
  p = std::fma(p, r, 1.0f);
  const int32_t bits = (static_cast<int32_t>(n) + 127) << 23;
  float scale;
  std::memcpy(&scale, &bits, sizeof scale);
  return p * scale;
}

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

template <class T>
void rms_norm(const T* x, int64_t x_batch, int64_t x_row, const float* weight, int64_t weight_batch, T* out,
              int64_t batch, int64_t seq, int64_t dim, float eps, int threads) {
#pragma omp parallel for num_threads(threads) schedule(static)
  for (int64_t r = 0; r < batch * seq; ++r) {
    const int64_t b = r / seq;
    const T* row = x + b * x_batch + r % seq * x_row;
    scale_row(row, weight + b * weight_batch, out + r * dim, dim, inverse_rms(row, dim, eps));
  }
}

template <class T>
void residual_norm(const T* x, int64_t x_batch, int64_t x_row, const T* branch, int64_t branch_batch,
                   int64_t branch_row, const float* post, int64_t post_batch, const float* pre, int64_t pre_batch,
                   T* x_out, T* h_out, int64_t batch, int64_t seq, int64_t dim, float eps, int threads) {
#pragma omp parallel for num_threads(threads) schedule(static)
  for (int64_t r = 0; r < batch * seq; ++r) {
    const int64_t b = r / seq, s = r % seq;
    const T *old = x + b * x_batch + s * x_row, *add = branch + b * branch_batch + s * branch_row;
    const float* w = post + b * post_batch;
    const float factor = inverse_rms(add, dim, eps);
    T* sum = x_out + r * dim;
#pragma omp simd
    for (int64_t i = 0; i < dim; ++i) store(sum + i, load(old[i]) + load(add[i]) * factor * w[i]);
    if (h_out) scale_row(sum, pre + b * pre_batch, h_out + r * dim, dim, inverse_rms(sum, dim, eps));
  }
}

template <class T>
void swiglu(const T* x, T* out, int64_t rows, int64_t hidden, int threads) {
#pragma omp parallel for num_threads(threads) schedule(static)
  for (int64_t r = 0; r < rows; ++r) {
    const T *a = x + 2 * r * hidden, *b = a + hidden;
#pragma omp simd
    for (int64_t i = 0; i < hidden; ++i) {
      const float v = load(a[i]);
      store(out + r * hidden + i, v / (1.0f + fast_exp(-v)) * load(b[i]));
    }
  }
}

constexpr int64_t TILE = 128;  // elements staged on the stack, so that each loop sees adjacent data

// One head: x <- rotate(round(rms_norm(x))); the reference networks round between norm and rotation.
template <class T>
inline void norm_rotate(T* x, const float* weight, const float* cos, const float* sin, int64_t dim, float eps) {
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
    for (int64_t i = 0; i < n; ++i) store(x + start + i, turned[i]);
  }
}

template <class T>
void qk_norm_rope(T* qkv, const float* q_weight, const float* k_weight, const float* cos, const float* sin,
                  int64_t batch, int64_t rope_batch, int64_t seq, int64_t heads, int64_t dim, float eps, int threads) {
#pragma omp parallel for num_threads(threads) schedule(static)
  for (int64_t r = 0; r < batch * seq; ++r) {
    const int64_t angle = (rope_batch == 1 ? r % seq : r) * (dim / 2);
    T* row = qkv + r * 3 * heads * dim;
    for (int64_t h = 0; h < 2 * heads; ++h)
      norm_rotate(row + h * dim, h < heads ? q_weight : k_weight, cos + angle, sin + angle, dim, eps);
  }
}

template <class T>
void x0_project(const T* x, const T* velocity, T* out, int64_t n, float t, int threads) {
#pragma omp parallel for simd num_threads(threads) schedule(static)
  for (int64_t i = 0; i < n; ++i) store(out + i, load(x[i]) - t * load(velocity[i]));
}

// n bytes of one channel; column is the distance between the pixels of source.
template <class T>
inline void quantize(const T* source, int64_t column, uint8_t* bytes, int64_t n) {
#pragma omp simd
  for (int64_t i = 0; i < n; ++i) {
    float v = load(source[i * column]) * 0.5f + 0.5f;
    v = v > 0.0f ? v : 0.0f;  // NaN too
    v = v < 1.0f ? v : 1.0f;
    bytes[i] = static_cast<uint8_t>(static_cast<int32_t>(std::nearbyint(v * 255.0f)));
  }
}

template <class T>
void to_uint8(const T* image, const int64_t* s, uint8_t* out, int64_t batch, int64_t channels, int64_t height,
              int64_t width, int threads) {
#pragma omp parallel for num_threads(threads) schedule(static)
  for (int64_t row = 0; row < batch * height; ++row)
    for (int64_t c = 0; c < channels; ++c) {
      const T* source = image + row / height * s[0] + c * s[1] + row % height * s[2];
      uint8_t* target = out + row * width * channels + c;
      for (int64_t x = 0; x < width; x += TILE) {
        uint8_t bytes[TILE];
        const int64_t n = width - x < TILE ? width - x : TILE;
        if (s[3] == 1)  // a constant stride vectorises
          quantize(source + x, 1, bytes, n);
        else
          quantize(source + x * s[3], s[3], bytes, n);
        for (int64_t i = 0; i < n; ++i) target[(x + i) * channels] = bytes[i];
      }
    }
}

// -- the C signatures, over both storage types --

template <class F>
int typed(int dtype, F&& run) {
  if (dtype == TWINFLOW_F32) return run(float{}), TWINFLOW_OK;
  if (dtype == TWINFLOW_BF16) return run(bf16{}), TWINFLOW_OK;
  return TWINFLOW_BAD_DTYPE;
}

int c_rms_norm(const void* x, int64_t x_batch, int64_t x_row, const float* weight, int64_t weight_batch, void* out,
               int64_t batch, int64_t seq, int64_t dim, float eps, int dtype, int threads) {
  if (batch < 0 || seq < 0 || dim < 1) return TWINFLOW_BAD_SHAPE;
  if (batch * seq && !(x && weight && out)) return TWINFLOW_NULL_POINTER;
  return typed(dtype, [&](auto t) {
    using T = decltype(t);
    rms_norm(static_cast<const T*>(x), x_batch, x_row, weight, weight_batch, static_cast<T*>(out), batch, seq, dim,
             eps, threads);
  });
}

int c_residual_norm(const void* x, int64_t x_batch, int64_t x_row, const void* branch, int64_t branch_batch,
                    int64_t branch_row, const float* post, int64_t post_batch, const float* pre, int64_t pre_batch,
                    void* x_out, void* h_out, int64_t batch, int64_t seq, int64_t dim, float eps, int dtype,
                    int threads) {
  if (batch < 0 || seq < 0 || dim < 1) return TWINFLOW_BAD_SHAPE;
  if (batch * seq && (!(x && branch && post && x_out) || !pre != !h_out)) return TWINFLOW_NULL_POINTER;
  return typed(dtype, [&](auto t) {
    using T = decltype(t);
    residual_norm(static_cast<const T*>(x), x_batch, x_row, static_cast<const T*>(branch), branch_batch, branch_row,
                  post, post_batch, pre, pre_batch, static_cast<T*>(x_out), static_cast<T*>(h_out), batch, seq, dim,
                  eps, threads);
  });
}

int c_swiglu(const void* x, void* out, int64_t rows, int64_t hidden, int dtype, int threads) {
  if (rows < 0 || hidden < 1) return TWINFLOW_BAD_SHAPE;
  if (rows && !(x && out)) return TWINFLOW_NULL_POINTER;
  return typed(dtype, [&](auto t) {
    using T = decltype(t);
    swiglu(static_cast<const T*>(x), static_cast<T*>(out), rows, hidden, threads);
  });
}

int c_qk_norm_rope(void* qkv, const float* q_weight, const float* k_weight, const float* cos, const float* sin,
                   int64_t batch, int64_t rope_batch, int64_t seq, int64_t heads, int64_t dim, float eps, int dtype,
                   int threads) {
  if (batch < 0 || seq < 0 || heads < 1 || dim < 2 || dim % 2) return TWINFLOW_BAD_SHAPE;
  if (rope_batch != 1 && rope_batch != batch) return TWINFLOW_BAD_SHAPE;
  if (batch * seq && !(qkv && q_weight && k_weight && cos && sin)) return TWINFLOW_NULL_POINTER;
  return typed(dtype, [&](auto t) {
    qk_norm_rope(static_cast<decltype(t)*>(qkv), q_weight, k_weight, cos, sin, batch, rope_batch, seq, heads, dim, eps,
                 threads);
  });
}

int c_x0_project(const void* x, const void* velocity, void* out, int64_t n, float t, int dtype, int threads) {
  if (n < 0) return TWINFLOW_BAD_SHAPE;
  if (n && !(x && velocity && out)) return TWINFLOW_NULL_POINTER;
  return typed(dtype, [&](auto kind) {
    using T = decltype(kind);
    x0_project(static_cast<const T*>(x), static_cast<const T*>(velocity), static_cast<T*>(out), n, t, threads);
  });
}

int c_to_uint8(const void* image, const int64_t strides[4], uint8_t* out, int64_t batch, int64_t channels,
               int64_t height, int64_t width, int dtype, int threads) {
  if (batch < 0 || channels < 1 || height < 0 || width < 0) return TWINFLOW_BAD_SHAPE;
  if (batch * height * width && !(image && strides && out)) return TWINFLOW_NULL_POINTER;
  return typed(dtype, [&](auto t) {
    to_uint8(static_cast<const decltype(t)*>(image), strides, out, batch, channels, height, width, threads);
  });
}

}  // namespace

const twinflow_kernels& TWINFLOW_ISA() {
  static const twinflow_kernels table = {c_rms_norm, c_residual_norm, c_swiglu,
                                         c_qk_norm_rope, c_x0_project, c_to_uint8};
  return table;
}
