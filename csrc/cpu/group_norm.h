// GroupNorm and SiLU over pixels whose channels are adjacent.
#pragma once

#include "common.h"
#include "mlp.h"

namespace {

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

int c_group_norm_silu(const void* x, const void* weight, const void* bias, void* out, float* scratch, int64_t batch,
                      int64_t pixels, int64_t channels, int64_t groups, float eps, int dtype, int threads) {
  if (batch < 0 || pixels < 0 || groups < 1 || channels < 1 || channels % groups) return TWINFLOW_BAD_SHAPE;
  if (batch > 0 && pixels > 0 && !(x && weight && bias && out && scratch)) return TWINFLOW_NULL_POINTER;
  return typed(dtype, [&](auto t) {
    using T = decltype(t);
    if (batch > 0 && pixels > 0)
      group_norm_silu(static_cast<const T*>(x), static_cast<const T*>(weight), static_cast<const T*>(bias),
                      static_cast<T*>(out), scratch, batch, pixels, channels, groups, eps, threads);
  });
}

}  // namespace
