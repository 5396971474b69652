/* The C interface from plain C99: every array is exactly as large as documented and on the heap, so a
 * sanitizer sees any access beyond it. Results are compared with sums in double. */

#include <math.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>

#include "twinflow_rt.h"

#define EXPECT(condition)                            \
  do {                                               \
    if (!(condition)) {                              \
      printf("line %d: %s\n", __LINE__, #condition); \
      exit(1);                                       \
    }                                                \
  } while (0)

#define RUN(name, ...) twinflow_cpu_kernels()->name(__VA_ARGS__)

static twinflow_rows rows_at(void* data, int64_t batch, int64_t row) { return (twinflow_rows){data, batch, row}; }
static twinflow_weights shared(const float* data) { return (twinflow_weights){data, 0}; }
static twinflow_weights each(const float* data, int64_t dim) { return (twinflow_weights){data, dim}; }
static twinflow_out stored(void* data) { return (twinflow_out){data, NULL, TWINFLOW_STORED}; }
static twinflow_out int8(int8_t* data, float* scales) { return (twinflow_out){data, scales, TWINFLOW_I8}; }
static twinflow_launch with(int dtype, int threads) { return (twinflow_launch){dtype, threads, NULL}; }
static twinflow_launch on(int threads) { return with(TWINFLOW_F32, threads); }

static float* numbers(int64_t n, unsigned seed) {
  float* out = malloc((size_t)(n ? n : 1) * sizeof *out);
  srand(seed);
  for (int64_t i = 0; i < n; ++i) out[i] = (float)rand() / (float)RAND_MAX * 4 - 2;
  return out;
}

static double factor(const float* x, int64_t dim, double eps) {
  double sum = 0;
  for (int64_t i = 0; i < dim; ++i) sum += (double)x[i] * x[i];
  return 1 / sqrt(sum / (double)dim + eps);
}

/* The mean of a row, and 1 / sqrt(variance + eps). */
static double centre(const float* x, int64_t dim, double eps, double* scale) {
  double sum = 0, squares = 0;
  for (int64_t i = 0; i < dim; ++i) sum += x[i];
  for (int64_t i = 0; i < dim; ++i) squares += (x[i] - sum / (double)dim) * (x[i] - sum / (double)dim);
  *scale = 1 / sqrt(squares / (double)dim + eps);
  return sum / (double)dim;
}

static void close_to(float got, double want) { EXPECT(fabs(got - want) <= 1e-5 * (1 + fabs(want))); }

static void norms(int64_t batch, int64_t seq, int64_t dim) {
  const int64_t n = batch * seq * dim, row = dim + 3;
  /* x has gaps between its rows and ends with its last element */
  const int64_t span = batch * seq > 0 ? (batch * seq - 1) * row + dim : 0;
  float *x = numbers(span, 1), *branch = numbers(n, 2), *post = numbers(batch * dim, 3), *pre = numbers(dim, 4);
  float *sum = numbers(n, 5), *h = numbers(n, 6);
  const twinflow_shape shape = {batch, seq, dim};
  const twinflow_rows in = rows_at(x, seq * row, row), add = rows_at(branch, seq * dim, dim);
  EXPECT(!RUN(residual_norm, in, add, each(post, dim), shared(pre), sum, stored(h), shape, 1e-5f, on(3)));
  for (int64_t r = 0; r < batch * seq; ++r) {
    const double f = factor(branch + r * dim, dim, 1e-5), g = factor(sum + r * dim, dim, 1e-5);
    for (int64_t i = 0; i < dim; ++i) {
      close_to(sum[r * dim + i], x[r * row + i] + branch[r * dim + i] * f * post[r / seq * dim + i]);
      close_to(h[r * dim + i], sum[r * dim + i] * g * pre[i]);
    }
  }
  EXPECT(!RUN(rms_norm, in, shared(pre), stored(h), shape, 1e-5f, on(2)));
  for (int64_t r = 0; r < batch * seq; ++r)
    for (int64_t i = 0; i < dim; ++i)
      close_to(h[r * dim + i], x[r * row + i] * factor(x + r * row, dim, 1e-5) * pre[i]);
  EXPECT(!RUN(residual_layer_norm, in, add, each(post, dim), shared(pre), shared(NULL), sum, stored(h), shape, 1e-3f,
              on(3)));
  for (int64_t r = 0; r < batch * seq; ++r) {
    double scale, mean = centre(sum + r * dim, dim, 1e-3, &scale);
    for (int64_t i = 0; i < dim; ++i) {
      close_to(sum[r * dim + i], x[r * row + i] + branch[r * dim + i] * post[r / seq * dim + i]);
      close_to(h[r * dim + i], (sum[r * dim + i] - mean) * scale * pre[i]);
    }
  }
  EXPECT(!RUN(layer_norm, in, shared(NULL), each(post, dim), stored(h), shape, 1e-3f, on(2)));
  for (int64_t r = 0; r < batch * seq; ++r) {
    double scale, mean = centre(x + r * row, dim, 1e-3, &scale);
    for (int64_t i = 0; i < dim; ++i)
      close_to(h[r * dim + i], (x[r * row + i] - mean) * scale + post[r / seq * dim + i]);
  }
  free(x), free(branch), free(post), free(pre), free(sum), free(h);
}

static void pointwise(int64_t rows, int64_t hidden) {
  const int64_t n = rows * hidden;
  float *x = numbers(2 * n, 7), *out = numbers(n, 8);
  EXPECT(!RUN(swiglu, x, stored(out), rows, hidden, on(2)));
  for (int64_t r = 0; r < rows; ++r)
    for (int64_t i = 0; i < hidden; ++i) {
      const double a = x[2 * r * hidden + i], b = x[(2 * r + 1) * hidden + i];
      close_to(out[r * hidden + i], a / (1 + exp(-a)) * b);
    }
  EXPECT(!RUN(gelu_tanh, x, stored(out), rows, hidden, on(2)));
  for (int64_t i = 0; i < n; ++i) {
    const double v = x[i];
    close_to(out[i], v / 2 * (1 + tanh(0.7978845608028654 * (v + 0.044715 * v * v * v))));
  }
  EXPECT(!RUN(x0_project, x, x + n, out, n, 0.25f, on(2)));
  for (int64_t i = 0; i < n; ++i) close_to(out[i], x[i] - 0.25 * x[n + i]);
  free(x), free(out);
}

/* Rows of int8 stand for those of `want`. */
static void stand_for(const int8_t* values, const float* scales, const float* want, int64_t rows, int64_t dim) {
  for (int64_t r = 0; r < rows; ++r) {
    double top = 0;
    for (int64_t i = 0; i < dim; ++i) top = fmax(top, fabs(want[r * dim + i]));
    close_to(scales[r] * 127, top);
    for (int64_t i = 0; i < dim; ++i)
      EXPECT(fabs((double)values[r * dim + i] * scales[r] - want[r * dim + i]) <= 0.5 * scales[r] + 1e-5 * (1 + top));
  }
}

static void quantized_norms(int64_t batch, int64_t seq, int64_t dim) {
  const int64_t rows = batch * seq, n = rows * dim;
  float *x = numbers(n, 15), *branch = numbers(n, 16), *w = numbers(dim, 17), *b = numbers(batch * dim, 18);
  float *sum = numbers(n, 19), *other = numbers(n, 20), *want = numbers(n, 21), *scales = numbers(rows, 22);
  int8_t* values = malloc((size_t)(n ? n : 1));
  const twinflow_shape shape = {batch, seq, dim};
  const twinflow_rows in = rows_at(x, seq * dim, dim), add = rows_at(branch, seq * dim, dim);
  const twinflow_weights one = shared(w), many = each(b, dim), none = shared(NULL);
  const twinflow_out plain = stored(want), made = int8(values, scales);
  EXPECT(!RUN(quantize_rows, in, made, shape, on(2)));
  stand_for(values, scales, x, rows, dim);
  EXPECT(!RUN(rms_norm, in, many, plain, shape, 1e-5f, on(2)));
  EXPECT(!RUN(rms_norm, in, many, made, shape, 1e-5f, on(2)));
  stand_for(values, scales, want, rows, dim);
  EXPECT(!RUN(layer_norm, in, one, many, plain, shape, 1e-3f, on(2)));
  EXPECT(!RUN(layer_norm, in, one, many, made, shape, 1e-3f, on(2)));
  stand_for(values, scales, want, rows, dim);
  EXPECT(!RUN(residual_norm, in, add, one, many, sum, plain, shape, 1e-5f, on(2)));
  EXPECT(!RUN(residual_norm, in, add, one, many, other, made, shape, 1e-5f, on(2)));
  stand_for(values, scales, want, rows, dim);
  for (int64_t i = 0; i < n; ++i) close_to(other[i], sum[i]);
  EXPECT(!RUN(residual_layer_norm, in, add, many, one, none, sum, plain, shape, 1e-3f, on(2)));
  EXPECT(!RUN(residual_layer_norm, in, add, many, one, none, other, made, shape, 1e-3f, on(2)));
  stand_for(values, scales, want, rows, dim);
  for (int64_t i = 0; i < n; ++i) close_to(other[i], sum[i]);
  free(x), free(branch), free(w), free(b), free(sum), free(other), free(want), free(scales), free(values);
}

static void quantized_activations(int64_t rows, int64_t width) {
  const int64_t n = rows * width;
  float *x = numbers(2 * n, 23), *want = numbers(n, 24), *scales = numbers(rows, 25);
  int8_t* values = malloc((size_t)(n ? n : 1));
  EXPECT(!RUN(swiglu, x, stored(want), rows, width, on(2)));
  EXPECT(!RUN(swiglu, x, int8(values, scales), rows, width, on(2)));
  stand_for(values, scales, want, rows, width);
  EXPECT(!RUN(gelu_tanh, x, stored(want), rows, width, on(2)));
  EXPECT(!RUN(gelu_tanh, x, int8(values, scales), rows, width, on(2)));
  stand_for(values, scales, want, rows, width);
  free(x), free(want), free(scales), free(values);
}

static void sums_of_a_product(int64_t rows, int64_t columns) {
  const int64_t n = rows * columns;
  float *x = numbers(rows, 26), *w = numbers(columns, 27), *bias = numbers(columns, 28), *out = numbers(n, 29);
  int32_t* sums = malloc((size_t)(n ? n : 1) * sizeof *sums);
  for (int64_t i = 0; i < n; ++i) sums[i] = (int32_t)(i * 7919 % 2001 - 1000);
  EXPECT(!RUN(dequantize, sums, x, w, bias, out, rows, columns, on(2)));
  for (int64_t i = 0; i < n; ++i)
    close_to(out[i], (double)sums[i] * x[i / columns] * w[i % columns] + bias[i % columns]);
  EXPECT(!RUN(dequantize, sums, x, w, NULL, out, rows, columns, on(2)));
  for (int64_t i = 0; i < n; ++i) close_to(out[i], (double)sums[i] * x[i / columns] * w[i % columns]);
  free(x), free(w), free(bias), free(out), free(sums);
}

/* 7 bits of a sequence that no sum of products has a reason to like. */
static int8_t byte_at(int64_t i, int64_t seed) { return (int8_t)((i * 7919 + seed * 104729) % 255 - 127); }

static void products_of_int8(int64_t rows, int64_t columns, int64_t inputs) {
  const int64_t n = rows * columns;
  float *x_scales = numbers(rows, 46), *w_scales = numbers(columns, 47), *bias = numbers(columns, 48);
  float* out = numbers(n, 49);
  int8_t *x = malloc((size_t)(rows * inputs + !rows)), *w = malloc((size_t)(columns * inputs));
  for (int64_t i = 0; i < rows * inputs; ++i) x[i] = byte_at(i, 1);
  for (int64_t i = 0; i < columns * inputs; ++i) w[i] = byte_at(i, 2);
  for (int with_bias = 0; with_bias < 2; ++with_bias) {
    EXPECT(!RUN(linear_int8, x, x_scales, w, w_scales, with_bias ? bias : NULL, out, rows, columns, inputs, on(2)));
    for (int64_t i = 0; i < n; ++i) {
      int64_t sum = 0;
      for (int64_t k = 0; k < inputs; ++k) sum += x[i / columns * inputs + k] * w[i % columns * inputs + k];
      close_to(out[i], (double)sum * x_scales[i / columns] * w_scales[i % columns] + with_bias * bias[i % columns]);
    }
  }
  free(x_scales), free(w_scales), free(bias), free(out), free(x), free(w);
}

/* Group g of a weight of 4 bits: its scale is 1 + g % 3 times 2^-1, its minimum 3 + g % 2. */
static void products_of_int4(int64_t rows, int64_t columns, int64_t inputs, int64_t group, int with_minimums) {
  static const uint16_t halves[] = {0x3800, 0x3c00, 0x3e00}, threes[] = {0x4200, 0x4400};
  const int64_t n = rows * columns, groups = columns * inputs / group;
  float *x_scales = numbers(rows, 50), *w_scales = numbers(columns, 51), *out = numbers(n, 52);
  float* dense = numbers(columns * inputs, 53);
  int8_t *x = malloc((size_t)(rows * inputs)), *wide = malloc((size_t)(columns * inputs));
  uint8_t* packed = malloc((size_t)(columns * inputs / 2));
  uint16_t *scales = malloc((size_t)groups * sizeof *scales), *minimums = malloc((size_t)groups * sizeof *minimums);
  for (int64_t i = 0; i < rows * inputs; ++i) x[i] = byte_at(i, 3);
  for (int64_t i = 0; i < columns * inputs / 2; ++i) packed[i] = (uint8_t)byte_at(i, 4);
  for (int64_t g = 0; g < groups; ++g) scales[g] = halves[g % 3], minimums[g] = threes[g % 2];
  const twinflow_int4 weight = {packed, scales, with_minimums ? minimums : NULL, w_scales, group};
  EXPECT(!RUN(widen_int4, weight, wide, TWINFLOW_I8, columns, inputs, on(2)));
  EXPECT(!RUN(widen_int4, weight, dense, TWINFLOW_STORED, columns, inputs, on(2)));
  for (int64_t i = 0; i < columns * inputs; ++i) {
    const int64_t r = i / inputs, k = i % inputs, g = i / group;
    const uint8_t byte = packed[r * inputs / 2 + k / 64 * 32 + k % 32];
    const double scale = 0.5 * (double)(1 + g % 3), minimum = with_minimums ? (double)(3 + g % 2) : 8 * scale;
    const double v = (k % 64 < 32 ? byte & 15 : byte >> 4) * scale - minimum;
    EXPECT(wide[i] == (int8_t)nearbyint(v));
    close_to(dense[i], v * w_scales[r]);
  }
  EXPECT(!RUN(linear_int4, x, x_scales, weight, NULL, out, rows, columns, inputs, on(2)));
  for (int64_t i = 0; i < n; ++i) {
    int64_t sum = 0;
    for (int64_t k = 0; k < inputs; ++k) sum += x[i / columns * inputs + k] * wide[i % columns * inputs + k];
    close_to(out[i], (double)sum * x_scales[i / columns] * w_scales[i % columns]);
  }
  EXPECT(RUN(linear_int4, x, x_scales, weight, NULL, out, rows, columns, inputs + 32, on(1)) == TWINFLOW_BAD_SHAPE);
  EXPECT(RUN(linear_int4, x, NULL, weight, NULL, out, rows, columns, inputs, on(1)) == TWINFLOW_NULL_POINTER);
  EXPECT(RUN(widen_int4, weight, wide, TWINFLOW_E4M3, columns, inputs, on(1)) == TWINFLOW_BAD_DTYPE);
  free(x_scales), free(w_scales), free(out), free(dense), free(x), free(wide), free(packed), free(scales);
  free(minimums);
}

static void group_norm(int64_t batch, int64_t size, int64_t channels, int64_t groups) {
  const int64_t n = batch * size * channels, width = channels / groups;
  float *x = numbers(n, 30), *w = numbers(channels, 31), *b = numbers(channels, 32), *out = numbers(n, 33);
  float *scratch = numbers(32 * batch * channels, 34), *group = numbers(size * width, 35);
  const twinflow_shape shape = {batch, size, channels};
  EXPECT(!RUN(group_norm_silu, x, w, b, out, scratch, shape, groups, 1e-3f, on(2)));
  for (int64_t k = 0; k < batch * groups; ++k) {
    const int64_t first = k / groups * size * channels + k % groups * width;
    for (int64_t i = 0; i < size * width; ++i) group[i] = x[first + i / width * channels + i % width];
    double scale, mean = centre(group, size * width, 1e-3, &scale);
    for (int64_t i = 0; i < size * width; ++i) {
      const int64_t at = first + i / width * channels + i % width;
      const double v = (x[at] - mean) * scale * w[at % channels] + b[at % channels];
      close_to(out[at], v / (1 + exp(-v)));
    }
  }
  free(x), free(w), free(b), free(out), free(scratch), free(group);
}

/* One pixel of a 3x3 convolution of x [size, size, channels], enlarged or not, with kernel [3, 3, channels]. */
static double convolved(const float* x, const float* kernel, int64_t size, int64_t channels, int64_t at, int enlarged) {
  const int64_t all = size << enlarged;
  double sum = 0;
  for (int64_t tap = 0; tap < 9; ++tap) {
    const int64_t y = at / all + tap / 3 - 1, c = at % all + tap % 3 - 1;
    if (y < 0 || c < 0 || y >= all || c >= all) continue;
    for (int64_t i = 0; i < channels; ++i)
      sum += (double)x[((y >> enlarged) * size + (c >> enlarged)) * channels + i] * kernel[tap * channels + i];
  }
  return sum;
}

static void winograd(int64_t size, int64_t channels, int enlarged) {
  static const double g[4][3] = {{1, 0, 0}, {.5, .5, .5}, {.5, -.5, .5}, {0, 0, 1}};
  const int64_t side = enlarged ? 3 : 4, all = size << enlarged, across = (all + 1) / 2, tiles = across * across;
  float *x = numbers(size * size * channels, 36), *kernel = numbers(9 * channels, 37), *bias = numbers(1, 38);
  float *points = numbers(tiles * side * side * channels, 39), *sums = numbers(tiles * side * side, 40);
  float *added = numbers(all * all, 41), *out = numbers(all * all, 42);
  const twinflow_image in_size = {1, channels, size, size}, out_size = {1, 1, all, all};
  EXPECT(!RUN(winograd_input, x, points, in_size, 0, tiles, enlarged, on(2)));
  for (int64_t k = 0; k < tiles * side * side; ++k) { /* the product of a point is the caller's */
    const int64_t u = k / side % side + (enlarged && k / side % side == 2), v = k % side + (enlarged && k % side == 2);
    double sum = 0;
    for (int64_t i = 0; i < channels; ++i) {
      double entry = 0;
      for (int64_t tap = 0; tap < 9; ++tap) entry += g[u][tap / 3] * g[v][tap % 3] * kernel[tap * channels + i];
      sum += entry * points[k * channels + i];
    }
    sums[k] = (float)sum;
  }
  for (int half = 0; half < 2; ++half) /* strips of tiles may be asked for one by one */
    EXPECT(!RUN(winograd_output, sums + half * (tiles / 2) * side * side, bias, added, out, out_size,
                half ? tiles / 2 : 0, half ? tiles : tiles / 2, enlarged, on(2)));
  for (int64_t i = 0; i < all * all; ++i)
    EXPECT(fabs(out[i] - (convolved(x, kernel, size, channels, i, enlarged) + bias[0] + added[i])) < 1e-4);
  EXPECT(RUN(winograd_input, x, points, in_size, 0, tiles + 1, enlarged, on(1)) == TWINFLOW_BAD_SHAPE);
  EXPECT(RUN(winograd_output, sums, NULL, NULL, NULL, out_size, 0, 1, enlarged, on(1)) == TWINFLOW_NULL_POINTER);
  EXPECT(RUN(winograd_output, sums, NULL, NULL, out, out_size, 0, 1, enlarged, with(TWINFLOW_BF16, 1)) ==
         TWINFLOW_BAD_DTYPE);
  free(x), free(kernel), free(bias), free(points), free(sums), free(added), free(out);
}

static void rotary(int64_t batch, int64_t seq, int64_t heads, int64_t dim) {
  const int64_t row = 3 * heads * dim, n = batch * seq * row;
  float *qkv = numbers(n, 9), *before = malloc((size_t)n * sizeof *before), *joint = numbers(n, 14);
  float* w = numbers(dim, 10);
  float *cos = numbers(seq * dim / 2, 11), *sin = numbers(seq * dim / 2, 12);
  memcpy(before, qkv, (size_t)n * sizeof *qkv);
  const int64_t part = heads * dim;
  const twinflow_rows in = rows_at(qkv, seq * row, row), apart = rows_at(joint, seq * row, row);
  const twinflow_angles angles = {cos, sin, 0, dim / 2};
  const twinflow_shape shape = {batch, seq, dim};
  EXPECT(!RUN(qk_norm_rope, in, part, apart, part, w, w, angles, shape, heads, 3, 1e-5f, on(2)));
  EXPECT(!RUN(qk_norm_rope, in, part, in, part, w, w, angles, shape, heads, 2, 1e-5f, on(2)));
  EXPECT(!memcmp(joint, qkv, (size_t)n * sizeof *qkv));
  for (int64_t r = 0; r < batch * seq; ++r)
    for (int64_t h = 0; h < 3 * heads; ++h)
      for (int64_t i = 0; i < dim; i += 2) {
        const float *old = before + r * row + h * dim, *new = qkv + r * row + h * dim + i;
        const float c = cos[r % seq * dim / 2 + i / 2], s = sin[r % seq * dim / 2 + i / 2];
        const double f = factor(old, dim, 1e-5), re = old[i] * f * w[i], im = old[i + 1] * f * w[i + 1];
        close_to(new[0], h < 2 * heads ? re * c - im * s : old[i]);
        close_to(new[1], h < 2 * heads ? re * s + im * c : old[i + 1]);
      }
  free(qkv), free(before), free(joint), free(w), free(cos), free(sin);
}

static void rotary_halves(int64_t batch, int64_t seq, int64_t heads, int64_t kv_heads, int64_t dim) {
  const int64_t row = (heads + 2 * kv_heads) * dim, n = batch * seq * row, half = dim / 2;
  float *qkv = numbers(n, 31), *before = numbers(n, 31), *w = numbers(dim, 32);
  float *cos = numbers(seq * half, 33), *sin = numbers(seq * half, 34);
  const twinflow_angles angles = {cos, sin, 0, half};
  const twinflow_shape shape = {batch, seq, dim};
  EXPECT(
      !RUN(grouped_qk_norm_rope, rows_at(qkv, seq * row, row), w, NULL, angles, shape, heads, kv_heads, 1e-5f, on(2)));
  for (int64_t r = 0; r < batch * seq; ++r)
    for (int64_t h = 0; h < heads + 2 * kv_heads; ++h)
      for (int64_t i = 0; i < half; ++i) {
        const float *old = before + r * row + h * dim, *new = qkv + r * row + h * dim;
        const float c = cos[r % seq * half + i], s = sin[r % seq * half + i];
        const double f = factor(old, dim, 1e-5);
        const double re = h < heads ? old[i] * f * w[i] : old[i],
                     im = h < heads ? old[half + i] * f * w[half + i] : old[half + i];
        close_to(new[i], h < heads + kv_heads ? re * c - im * s : old[i]);
        close_to(new[half + i], h < heads + kv_heads ? re * s + im * c : old[half + i]);
      }
  free(qkv), free(before), free(w), free(cos), free(sin);
}

static void pixels(int64_t height, int64_t width) {
  const int64_t plane = height * width;
  const twinflow_image strides = {3 * plane, plane, width, 1}, size = {2, 3, height, width};
  float* image = numbers(2 * 3 * plane, 13);
  uint8_t* out = malloc((size_t)(6 * plane));
  image[0] = NAN;
  EXPECT(!RUN(to_uint8, image, strides, out, size, on(2)));
  EXPECT(out[0] == 0);
  for (int64_t i = 1; i < 6 * plane; ++i) {
    const int64_t c = i % 3, at = i / 3 % plane, b = i / 3 / plane;
    double v = image[b * 3 * plane + c * plane + at] * 0.5 + 0.5;
    v = v < 0 ? 0 : v > 1 ? 1 : v;
    EXPECT(fabs(out[i] - v * 255) <= 0.5001);
  }
  free(image), free(out);
}

static void bfloat16_rounds_to_even(void) {
  /* 1 + 2^-8 lies halfway between two bfloat16s and 1 + 3 * 2^-8 as well: down to even, up to even */
  const uint16_t one = 0x3f80, eighth_bit = 0x3b80, three = 0x3c40, inf = 0x7f80;
  uint16_t out;
  EXPECT(!RUN(x0_project, &one, &eighth_bit, &out, 1, -1.0f, with(TWINFLOW_BF16, 1)) && out == 0x3f80);
  EXPECT(!RUN(x0_project, &one, &three, &out, 1, -1.0f, with(TWINFLOW_BF16, 1)) && out == 0x3f82);
  EXPECT(!RUN(x0_project, &inf, &inf, &out, 1, 1.0f, with(TWINFLOW_BF16, 1)) && (out & 0x7fff) > 0x7f80);
}

static void errors(void) {
  float v[4] = {1, 2, 3, 4};
  const twinflow_rows row = rows_at(v, 0, 0);
  const twinflow_angles angles = {v, v, 0, 0}, no_cos = {NULL, v, 0, 0};
  const twinflow_shape odd = {1, 1, 1}, pair = {1, 1, 2}, four = {1, 1, 4};
  const twinflow_out e4m3 = {v, v, TWINFLOW_E4M3};
  EXPECT(RUN(swiglu, v, stored(NULL), 1, 2, on(1)) == TWINFLOW_NULL_POINTER);
  EXPECT(RUN(swiglu, v, stored(v), 1, 0, on(1)) == TWINFLOW_BAD_SHAPE);
  EXPECT(RUN(swiglu, v, stored(v), 1, 2, with(7, 1)) == TWINFLOW_BAD_DTYPE);
  EXPECT(RUN(swiglu, v, e4m3, 1, 2, on(1)) == TWINFLOW_BAD_DTYPE);
  EXPECT(RUN(swiglu, NULL, stored(NULL), 0, 2, on(1)) == TWINFLOW_OK);
  EXPECT(RUN(gelu_tanh, v, int8((int8_t*)v, NULL), 1, 2, on(1)) == TWINFLOW_NULL_POINTER);
  EXPECT(RUN(quantize_rows, row, stored(v), four, on(1)) == TWINFLOW_BAD_DTYPE); /* there is nothing to quantize to */
  /* what is to be normed after the sum, and where it goes: both or none */
  EXPECT(RUN(residual_norm, row, row, shared(v), shared(v), v, stored(NULL), four, 1, on(1)) == TWINFLOW_NULL_POINTER);
  EXPECT(RUN(residual_norm, row, row, shared(v), shared(NULL), v, stored(v), four, 1, on(1)) == TWINFLOW_NULL_POINTER);
  EXPECT(RUN(qk_norm_rope, row, 1, row, 1, v, v, angles, odd, 1, 2, 0, on(1)) == TWINFLOW_BAD_SHAPE);
  EXPECT(RUN(grouped_qk_norm_rope, row, v, v, angles, pair, 1, 0, 0, on(1)) == TWINFLOW_BAD_SHAPE);
  EXPECT(RUN(grouped_qk_norm_rope, row, v, v, no_cos, pair, 1, 1, 0, on(1)) == TWINFLOW_NULL_POINTER);
  EXPECT(RUN(group_norm_silu, v, v, v, v, v, four, 3, 1, on(1)) == TWINFLOW_BAD_SHAPE);
  EXPECT(RUN(dequantize, NULL, v, v, NULL, v, 1, 4, on(1)) == TWINFLOW_NULL_POINTER);
  EXPECT(RUN(linear_int8, NULL, v, NULL, v, NULL, v, 1, 4, 4, on(1)) == TWINFLOW_NULL_POINTER);
  EXPECT(RUN(linear_int8, NULL, v, NULL, v, NULL, v, 1, 4, 0, on(1)) == TWINFLOW_BAD_SHAPE);
  EXPECT(strstr(twinflow_error_message(TWINFLOW_NULL_POINTER), "NULL") != NULL);
  EXPECT(strcmp(twinflow_error_message(-1), "unknown status") == 0);
  EXPECT(twinflow_abi_version() == TWINFLOW_ABI_VERSION);
}

int main(void) {
  norms(1, 1, 1), norms(2, 3, 37), norms(3, 2, 199), norms(2, 0, 8);
  pointwise(1, 1), pointwise(3, 37), pointwise(0, 8);
  rotary(1, 1, 1, 2), rotary(2, 5, 3, 26);
  rotary_halves(1, 1, 1, 1, 2), rotary_halves(2, 5, 3, 1, 26), rotary_halves(1, 2, 4, 2, 24);
  pixels(1, 1), pixels(5, 37);
  quantized_norms(1, 1, 1), quantized_norms(2, 3, 37), quantized_norms(3, 1, 199), quantized_norms(2, 0, 8);
  quantized_activations(1, 1), quantized_activations(3, 37), quantized_activations(0, 8);
  quantized_activations(1, 16385); /* wider than what is staged on the stack */
  sums_of_a_product(1, 1), sums_of_a_product(5, 37), sums_of_a_product(0, 8);
  products_of_int8(1, 1, 1), products_of_int8(5, 50, 37), products_of_int8(259, 7, 1027), products_of_int8(0, 8, 8);
  products_of_int4(1, 1, 64, 32, 0), products_of_int4(5, 50, 1088, 64, 1), products_of_int4(7, 3, 256, 128, 1);
  group_norm(1, 1, 1, 1), group_norm(2, 37, 12, 3), group_norm(1, 19, 144, 2), group_norm(1, 0, 8, 2);
  winograd(1, 1, 0), winograd(7, 5, 0), winograd(4, 130, 0), winograd(1, 1, 1), winograd(5, 9, 1);
  bfloat16_rounds_to_even();
  errors();
  const int released = twinflow_cpu_release_threads();
  EXPECT(released == 0 || released == -1);
  pointwise(3, 37); /* with threads that are started anew */
  const int apart = twinflow_cpu_threads_apart(2);
  EXPECT(apart == 0 || apart == 1);
  EXPECT(twinflow_cpu_threads_apart(2) == 0); /* they are */
  pointwise(3, 37);
  EXPECT(twinflow_cpu_threads_together() <= apart && twinflow_cpu_threads_together() == 0);
  printf("C interface: ok, %s\n", twinflow_cpu_isa());
  return 0;
}
