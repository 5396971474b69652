// The norm family, one row at a time, and GroupNorm over pixels whose channels are adjacent.
#pragma once

#include "mlp.h"
#include "rows.h"

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

// RMS norm of one row, to row r of out.
template <class T>
inline void rms_row(const T* x, const float* w, const twinflow_out& out, int64_t r, int64_t dim, float eps) {
  const float factor = inverse_rms(x, dim, eps);
  if (stored(out)) return scale_row(x, w, row_like(x, out.data, r, dim), dim, factor);
  quantize_row(out, r, dim, [=](int64_t i) { return load(x[i]) * factor * w[i]; });
}

// Layer norm of one row, to row r of out; either of w and b may be null.
template <class T>
inline void layer_row(const T* x, const float* w, const float* b, const twinflow_out& out, int64_t r, int64_t dim,
                      float eps) {
  const Centre row(x, dim, eps);
  const float mean = row.mean, factor = row.factor;
  if (stored(out)) return scale_centered(x, w, b, row_like(x, out.data, r, dim), dim, mean, factor);
  const auto plain = [=](int64_t i) { return (load(x[i]) - mean) * factor; };
  if (w && b)
    quantize_row(out, r, dim, [=](int64_t i) { return plain(i) * w[i] + b[i]; });
  else if (w)
    quantize_row(out, r, dim, [=](int64_t i) { return plain(i) * w[i]; });
  else if (b)
    quantize_row(out, r, dim, [=](int64_t i) { return plain(i) + b[i]; });
  else
    quantize_row(out, r, dim, plain);
}

// sum = x + rms_norm(branch, weight). Not inlined: the compiler makes two loops of its caller's, with and without what
// follows, and may order the sums of each in another way.
template <class T>
[[gnu::noinline]] void add_rms_row(const T* x, const T* branch, const float* weight, T* sum, int64_t dim, float eps) {
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

// visit(row, b, r) for every row of x, of its dtype.
template <class F>
int norm_rows(const twinflow_rows& x, const twinflow_shape& shape, const twinflow_launch& how, F&& visit) {
  return typed(how.dtype, [&](auto t) {
    each_row(shape, 1, how.threads,
             [&](int64_t b, int64_t s, int64_t r) { visit(at<const decltype(t)>(x, b, s), b, r); });
  });
}

// visit(row of x, row of branch, row of sum, b, r) for all of them.
template <class F>
int residual_rows(const twinflow_rows& x, const twinflow_rows& branch, void* sum, const twinflow_shape& shape,
                  const twinflow_launch& how, F&& visit) {
  return norm_rows(x, shape, how, [&](const auto* row, int64_t b, int64_t r) {
    using T = std::remove_const_t<std::remove_pointer_t<decltype(row)>>;
    visit(row, at<const T>(branch, b, r % shape.seq), static_cast<T*>(sum) + r * shape.dim, b, r);
  });
}

int launch_rms_norm(twinflow_rows x, twinflow_weights weight, twinflow_out out, twinflow_shape shape, float eps,
                    twinflow_launch how) {
  if (const int error = out_error(shape, x.data && weight.data && complete(out), out)) return error;
  return norm_rows(x, shape, how,
                   [&](const auto* row, int64_t b, int64_t r) { rms_row(row, at(weight, b), out, r, shape.dim, eps); });
}

int launch_layer_norm(twinflow_rows x, twinflow_weights weight, twinflow_weights bias, twinflow_out out,
                      twinflow_shape shape, float eps, twinflow_launch how) {
  if (const int error = out_error(shape, x.data && complete(out), out)) return error;
  return norm_rows(x, shape, how, [&](const auto* row, int64_t b, int64_t r) {
    layer_row(row, at(weight, b), at(bias, b), out, r, shape.dim, eps);
  });
}

int launch_residual_norm(twinflow_rows x, twinflow_rows branch, twinflow_weights post, twinflow_weights pre, void* sum,
                         twinflow_out out, twinflow_shape shape, float eps, twinflow_launch how) {
  const bool fits = pre.data ? complete(out) : stored(out) && !out.data;
  if (const int error = out_error(shape, x.data && branch.data && post.data && sum && fits, out)) return error;
  return residual_rows(x, branch, sum, shape, how,
                       [&](const auto* old, const auto* add, auto* total, int64_t b, int64_t r) {
                         add_rms_row(old, add, at(post, b), total, shape.dim, eps);
                         if (out.data) rms_row(total, at(pre, b), out, r, shape.dim, eps);
                       });
}

int launch_residual_layer_norm(twinflow_rows x, twinflow_rows branch, twinflow_weights gate, twinflow_weights weight,
                               twinflow_weights bias, void* sum, twinflow_out out, twinflow_shape shape, float eps,
                               twinflow_launch how) {
  if (const int error = out_error(shape, x.data && branch.data && sum && complete(out), out)) return error;
  return residual_rows(x, branch, sum, shape, how,
                       [&](const auto* old, const auto* add, auto* total, int64_t b, int64_t r) {
                         add_gated_row(old, add, at(gate, b), total, shape.dim);
                         layer_row(total, at(weight, b), at(bias, b), out, r, shape.dim, eps);
                       });
}

constexpr int64_t MOMENT_BLOCKS = 16;  // parts of a sample that are summed apart, whatever the number of threads

// Sums of x - shift and of its square per channel, over pixels [first, last): shifted, so that a mean far from
// zero costs no digits.
template <class T>
void moments(const T* x, const T* shift, float* sums, int64_t first, int64_t last, int64_t channels) {
  float* squares = sums + channels;
  for (int64_t c = 0; c < channels; c += TILE) {
    const int64_t n = channels - c < TILE ? channels - c : TILE;
    float s[TILE] = {}, q[TILE] = {}, k[TILE];
#pragma omp simd
    for (int64_t i = 0; i < n; ++i) k[i] = load(shift[c + i]);
    for (int64_t p = first; p < last; ++p) {
      const T* row = x + p * channels + c;
#pragma omp simd
      for (int64_t i = 0; i < n; ++i) {
        const float v = load(row[i]) - k[i];
        s[i] += v;
        q[i] += v * v;
      }
    }
    std::memcpy(sums + c, s, n * sizeof(float));
    std::memcpy(squares + c, q, n * sizeof(float));
  }
}

// From all blocks' sums to scale and offset per channel, which take the place of the first block's sums.
template <class T, class W>
void combine(const T* shift, float* sums, const W* weight, const W* bias, int64_t pixels, int64_t channels,
             int64_t groups, float eps) {
  const int64_t width = channels / groups;
  const double count = static_cast<double>(pixels);
  const auto total = [=](int64_t at) {
    double sum = 0;
    for (int64_t k = 0; k < MOMENT_BLOCKS; ++k) sum += sums[2 * k * channels + at];
    return sum / count;
  };
  for (int64_t g = 0; g < channels; g += width) {
    double mean = 0, square = 0, reference = load(shift[g]);
    for (int64_t c = g; c < g + width; ++c) {  // about the group's first channel instead of each one's own
      const double away = load(shift[c]) - reference, first = total(c);
      mean += first + away;
      square += total(channels + c) + 2 * away * first + away * away;
    }
    mean /= static_cast<double>(width);
    const double variance = square / static_cast<double>(width) - mean * mean;
    const double factor = 1.0 / std::sqrt((variance < 0 ? 0 : variance) + eps);
    for (int64_t c = g; c < g + width; ++c) {
      const double scale = factor * load(weight[c]);
      sums[c] = static_cast<float>(scale);
      sums[channels + c] = static_cast<float>(load(bias[c]) - (mean + reference) * scale);
    }
  }
}

// out = silu(x * scale + offset) for n elements; entry i of scale and offset is element i's.
template <class T>
inline void scale_silu(const T* x, T* out, const float* scale, const float* offset, int64_t n) {
#pragma omp simd
  for (int64_t i = 0; i < n; ++i) store(out + i, silu(load(x[i]) * scale[i] + offset[i]));
}

// Pixels [first, last). Few channels: as many pixels at once as fill a tile, with the constants repeated.
template <class T>
void apply(const T* x, T* out, const float* scale, const float* offset, int64_t first, int64_t last, int64_t channels) {
  if (channels > TILE / 2) {
    for (int64_t p = first; p < last; ++p) scale_silu(x + p * channels, out + p * channels, scale, offset, channels);
    return;
  }
  const int64_t wide = TILE / channels * channels;
  float scales[TILE], offsets[TILE];
  for (int64_t i = 0; i < wide; ++i) {
    scales[i] = scale[i % channels];
    offsets[i] = offset[i % channels];
  }
  for (int64_t i = first * channels; i < last * channels; i += wide) {
    const int64_t left = last * channels - i;
    scale_silu(x + i, out + i, scales, offsets, left < wide ? left : wide);
  }
}

template <class T, class W>
void group_norm_silu(const T* x, const W* weight, const W* bias, T* out, float* scratch, int64_t batch, int64_t pixels,
                     int64_t channels, int64_t groups, float eps, int threads) {
  const int64_t size = pixels * channels, each = 2 * MOMENT_BLOCKS * channels, blocks = batch * MOMENT_BLOCKS;
  const int used = team(4 * batch * size, threads);  // of exponentials, as in mlp.h
#pragma omp parallel for num_threads(used) schedule(static)
  for (int64_t k = 0; k < blocks; ++k) {
    const int64_t b = k / MOMENT_BLOCKS, part = k % MOMENT_BLOCKS;
    const T* sample = x + b * size;
    moments(sample, sample, scratch + b * each + 2 * part * channels, part * pixels / MOMENT_BLOCKS,
            (part + 1) * pixels / MOMENT_BLOCKS, channels);
  }
  for (int64_t b = 0; b < batch; ++b)
    combine(x + b * size, scratch + b * each, weight, bias, pixels, channels, groups, eps);
#pragma omp parallel for num_threads(used) schedule(static)
  for (int64_t k = 0; k < blocks; ++k) {
    const int64_t b = k / MOMENT_BLOCKS, part = k % MOMENT_BLOCKS;
    const float* scale = scratch + b * each;
    apply(x + b * size, out + b * size, scale, scale + channels, part * pixels / MOMENT_BLOCKS,
          (part + 1) * pixels / MOMENT_BLOCKS, channels);
  }
}

int launch_group_norm_silu(const void* x, const void* weight, const void* bias, void* out, float* scratch,
                           twinflow_shape shape, int64_t groups, float eps, twinflow_launch how) {
  if (groups < 1 || shape.dim % groups) return TWINFLOW_BAD_SHAPE;
  if (const int error = shape_error(shape, x && weight && bias && out && scratch)) return error;
  return typed(how.dtype, [&](auto t) {
    using T = decltype(t);
    if (shape.batch > 0 && shape.seq > 0)
      group_norm_silu(static_cast<const T*>(x), static_cast<const T*>(weight), static_cast<const T*>(bias),
                      static_cast<T*>(out), scratch, shape.batch, shape.seq, shape.dim, groups, eps, how.threads);
  });
}

}  // namespace
