// Winograd's transforms F(2x2, 3x3) of a 3x3 convolution (Lavin and Gray, arXiv 1509.09308) over pixels whose channels
// are adjacent. Per tile of 2x2 outputs, what lies between the two is a product per point of the transform, by a
// library. Behind a nearest enlargement by 2 the middle two of a tile's four rows are one, and so are its columns: a
// point of each axis is zero, and 9 of the 16 products remain.
#pragma once

#include "common.h"

namespace {

// Where the tile that stands at place k of all lies: sample, row and column, in tiles.
struct tile_place {
  int64_t sample, row, column;
  tile_place(int64_t k, int64_t rows, int64_t columns)
      : sample(k / columns / rows), row(k / columns % rows), column(k % columns) {}
};

// Of n channels: the four (of an enlarged image: three) values d along one axis, transformed to t, t + step, ...
template <bool ENLARGED>
inline void transform(const float* const* d, float* t, int64_t step, int64_t n) {
  const float *d0 = d[0], *d1 = d[1], *d2 = d[2], *d3 = ENLARGED ? d[2] : d[3];
  float *t1 = t + step, *t2 = t1 + step, *t3 = ENLARGED ? t2 : t2 + step;
#pragma omp simd
  for (int64_t i = 0; i < n; ++i) {
    if (ENLARGED) {
      t[i] = d0[i] - d1[i];
      t1[i] = d1[i] + d1[i];
      t2[i] = d1[i] - d2[i];
    } else {
      t[i] = d0[i] - d2[i];
      t1[i] = d1[i] + d2[i];
      t2[i] = d2[i] - d1[i];
      t3[i] = d1[i] - d3[i];
    }
  }
}

// One tile of n channels, at most TILE: the pixels at `in`, in rows, to the points at out + p * step.
template <bool ENLARGED>
inline void tile_in(const float* const* in, float* out, int64_t step, int64_t n) {
  constexpr int64_t side = ENLARGED ? 3 : 4;
  float across[side * side][TILE];
  for (int64_t y = 0; y < side; ++y) transform<ENLARGED>(in + y * side, across[y * side], TILE, n);
  for (int64_t x = 0; x < side; ++x) {
    const float* down[side];
    for (int64_t y = 0; y < side; ++y) down[y] = across[y * side + x];
    transform<ENLARGED>(down, out + x * step, side * step, n);
  }
}

// Points of tiles [first, last) of x [batch, height, width, channels], each tile [points, channels].
template <bool ENLARGED>
void winograd_input(const float* x, float* out, int64_t height, int64_t width, int64_t channels, int64_t first,
                    int64_t last, int threads) {
  constexpr int side = ENLARGED ? 3 : 4, stride = ENLARGED ? 1 : 2;  // pixels read, and from tile to tile
  static const float zeros[TILE] = {};
  const int64_t rows = (height + stride - 1) / stride, columns = (width + stride - 1) / stride;
#pragma omp parallel for num_threads(team((last - first) * channels * side, threads)) schedule(static)
  for (int64_t k = first; k < last; ++k) {
    const tile_place at(k, rows, columns);
    const float* pixels[side * side];
    for (int i = 0; i < side * side; ++i) {
      const int64_t y = at.row * stride + i / side - 1, c = at.column * stride + i % side - 1;
      const bool inside = y >= 0 && y < height && c >= 0 && c < width;
      pixels[i] = inside ? x + ((at.sample * height + y) * width + c) * channels : nullptr;
    }
    float* tile = out + (k - first) * side * side * channels;
    for (int64_t c = 0; c < channels; c += TILE) {
      const float* in[side * side];
      for (int i = 0; i < side * side; ++i) in[i] = pixels[i] ? pixels[i] + c : zeros;
      tile_in<ENLARGED>(in, tile + c, channels, channels - c < TILE ? channels - c : TILE);
    }
  }
}

// Of n channels: the two outputs, y0 and y1, of the points m, m + step, ... along one axis.
template <bool ENLARGED>
inline void inverse(const float* m, int64_t step, float* y0, float* y1, int64_t n) {
  const float *m1 = m + step, *m2 = m1 + step, *m3 = ENLARGED ? m2 : m2 + step;
#pragma omp simd
  for (int64_t i = 0; i < n; ++i) {
    y0[i] = ENLARGED ? m[i] + m1[i] : m[i] + m1[i] + m2[i];
    y1[i] = ENLARGED ? m1[i] - m2[i] : m1[i] - m2[i] - m3[i];
  }
}

// One tile of n channels, at most TILE: points at in + p * step to four pixels, plus bias and, where there is any,
// what is to be added.
template <bool ENLARGED, bool ADDS>
inline void tile_out(const float* in, int64_t step, const float* bias, const float* const* added, float* const* out,
                     int64_t n) {
  constexpr int64_t side = ENLARGED ? 3 : 4;
  float across[2][side][TILE], sums[2][TILE];
  for (int64_t y = 0; y < side; ++y) inverse<ENLARGED>(in + y * side * step, step, across[0][y], across[1][y], n);
  for (int64_t x = 0; x < 2; ++x) {
    inverse<ENLARGED>(across[x][0], TILE, sums[0], sums[1], n);
    for (int64_t y = 0; y < 2; ++y) {
      const float *sum = sums[y], *more = added[2 * y + x];
      float* pixel = out[2 * y + x];
#pragma omp simd
      for (int64_t i = 0; i < n; ++i) pixel[i] = sum[i] + bias[i] + (ADDS ? more[i] : 0.0f);
    }
  }
}

// Tiles [first, last) of out [batch, height, width, channels] from their points, each tile [points, channels].
template <bool ENLARGED, bool ADDS>
void winograd_output(const float* points, const float* bias, const float* added, float* out, int64_t height,
                     int64_t width, int64_t channels, int64_t first, int64_t last, int threads) {
  constexpr int side = ENLARGED ? 3 : 4;
  static const float zeros[TILE] = {};
  const int64_t rows = (height + 1) / 2, columns = (width + 1) / 2;
#pragma omp parallel for num_threads(team((last - first) * channels * side, threads)) schedule(static)
  for (int64_t k = first; k < last; ++k) {
    const tile_place at(k, rows, columns);
    const float* tile = points + (k - first) * side * side * channels;
    float beyond[TILE];  // where pixels go that an image of odd size lacks
    for (int64_t c = 0; c < channels; c += TILE) {
      const float* sums[4];
      float* pixels[4];
      for (int i = 0; i < 4; ++i) {
        const int64_t y = 2 * at.row + i / 2, x = 2 * at.column + i % 2;
        const int64_t place = ((at.sample * height + y) * width + x) * channels + c;
        const bool inside = y < height && x < width;
        pixels[i] = inside ? out + place : beyond;
        sums[i] = ADDS && inside ? added + place : zeros;
      }
      tile_out<ENLARGED, ADDS>(tile + c, channels, bias ? bias + c : zeros, sums, pixels,
                               channels - c < TILE ? channels - c : TILE);
    }
  }
}

inline int winograd_error(const twinflow_image& size, int64_t first, int64_t last, int dtype, bool complete) {
  if (dtype != TWINFLOW_F32) return TWINFLOW_BAD_DTYPE;
  const int64_t tiles = size.batch * ((size.height + 1) / 2) * ((size.width + 1) / 2);
  if (size.batch < 0 || size.height < 0 || size.width < 0 || size.channels < 1 || first < 0 || last < first ||
      last > tiles)
    return TWINFLOW_BAD_SHAPE;
  return last > first && !complete ? TWINFLOW_NULL_POINTER : TWINFLOW_OK;
}

int launch_winograd_input(const float* x, float* points, twinflow_image size, int64_t first, int64_t last, int enlarged,
                          twinflow_launch how) {
  const int64_t times = enlarged ? 2 : 1;  // the size of the output decides how many tiles there are
  const twinflow_image out{size.batch, size.channels, times * size.height, times * size.width};
  if (const int error = winograd_error(out, first, last, how.dtype, x && points)) return error;
  const auto run = enlarged ? winograd_input<true> : winograd_input<false>;
  run(x, points, size.height, size.width, size.channels, first, last, how.threads);
  return TWINFLOW_OK;
}

int launch_winograd_output(const float* points, const float* bias, const float* added, float* out, twinflow_image size,
                           int64_t first, int64_t last, int enlarged, twinflow_launch how) {
  if (const int error = winograd_error(size, first, last, how.dtype, points && out)) return error;
  const auto run = enlarged ? (added ? winograd_output<true, true> : winograd_output<true, false>)
                            : (added ? winograd_output<false, true> : winograd_output<false, false>);
  run(points, bias, added, out, size.height, size.width, size.channels, first, last, how.threads);
  return TWINFLOW_OK;
}

}  // namespace
