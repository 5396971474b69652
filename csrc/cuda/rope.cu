// QK RMSNorm + rotary embedding: one block a token, a few lanes of a warp a head.

#include "common.cuh"

namespace twinflow {
namespace {

constexpr int THREADS = 256;
constexpr int MAX_PER = 4;  // groups a lane holds

// Where q | k | v of a token start, each `heads * dim` long, in the source and in the target.
template <class T>
struct Token {
  Rows<T> rows;
  int64_t part;  // elements from q to k, and from k to v
  __device__ T* at(int64_t b, int64_t s, int p, int h, int dim) const {
    return rows.at(b, s) + p * part + static_cast<int64_t>(h) * dim;
  }
};

// `lanes` (a power of two) threads share a head, in PER groups of N each, `lanes` groups apart. Every
// lane of a warp takes part in every shuffle: a block walks its heads in step and idle lanes hold 0.
template <class T, int N, int PER>
__global__ void __launch_bounds__(THREADS)
    qk_norm_rope(Token<const T> from, Token<T> to, const float* q_weight, const float* k_weight, twinflow_angles angles,
                 int seq, int heads, int dim, int parts, int lanes, float eps) {
  const int64_t b = blockIdx.x / seq, s = blockIdx.x % seq;
  const int lane = threadIdx.x % lanes, step = blockDim.x / lanes;
  const float* cos = angles.cos + b * angles.batch + s * angles.row;
  const float* sin = angles.sin + b * angles.batch + s * angles.row;
  for (int first = 0; first < parts * heads; first += step) {
    const int item = first + threadIdx.x / lanes, p = item / heads, h = item % heads;
    const bool live = item < parts * heads;
    float v[PER][N], sum = 0;
#pragma unroll
    for (int g = 0; g < PER; ++g) {
      const int at = (g * lanes + lane) * N;
#pragma unroll
      for (int i = 0; i < N; ++i) v[g][i] = 0;
      if (live && at < dim) read_as_float<N>(from.at(b, s, p, h, dim) + at, v[g]);
#pragma unroll
      for (int i = 0; i < N; ++i) sum += v[g][i] * v[g][i];
    }
    for (int width = lanes / 2; width; width /= 2) sum += __shfl_xor_sync(~0u, sum, width);
    const float factor = rsqrtf(sum / dim + eps);
#pragma unroll
    for (int g = 0; g < PER; ++g) {
      const int at = (g * lanes + lane) * N;
      if (!live || at >= dim) continue;
      if (p < 2) {
        float w[N], c[N / 2], d[N / 2];
        read<N>((p ? k_weight : q_weight) + at, w);
        read<N / 2>(cos + at / 2, c);
        read<N / 2>(sin + at / 2, d);
#pragma unroll
        for (int i = 0; i < N; i += 2) {
          T re, im;  // the norm's result is rounded to storage before the rotation
          store(&re, v[g][i] * factor * w[i]);
          store(&im, v[g][i + 1] * factor * w[i + 1]);
          v[g][i] = load(re) * c[i / 2] - load(im) * d[i / 2];
          v[g][i + 1] = load(re) * d[i / 2] + load(im) * c[i / 2];
        }
      }
      write_rounded<N>(v[g], to.at(b, s, p, h, dim) + at);
    }
  }
}

int power_of_two(int64_t n) {
  int power = 1;
  while (power < n) power *= 2;
  return power;
}

template <class T>
bool whole_groups(const Token<T>& token, int64_t dim) {
  return twinflow::whole_groups(token.rows, dim) && token.part % WIDE<T> == 0;
}

bool even(const twinflow_angles& a) {
  return a.batch % 4 == 0 && a.row % 4 == 0 && aligned16(a.cos) && aligned16(a.sin);
}

}  // namespace

int launch_qk_norm_rope(twinflow_rows qkv, int64_t qkv_part, twinflow_rows out, int64_t out_part, const float* q_weight,
                        const float* k_weight, twinflow_angles angles, twinflow_shape shape, int64_t heads, int parts,
                        float eps, twinflow_launch how) {
  const int64_t dim = shape.dim;
  if (shape_error(shape) || heads < 1 || heads > INT32_MAX / 3 || dim % 2 || parts < 2 || parts > 3)
    return TWINFLOW_BAD_SHAPE;
  if (shape.batch * shape.seq == 0) return TWINFLOW_OK;
  if (!(qkv.data && out.data && q_weight && k_weight && angles.cos && angles.sin)) return TWINFLOW_NULL_POINTER;
  return typed(how.dtype, [&](auto kind) {
    using T = decltype(kind);
    const Token<const T> from{Rows<const T>(qkv), qkv_part};
    const Token<T> to{Rows<T>(out), out_part};
    const bool wide = dim <= 32 * WIDE<T> && whole_groups(from, dim) && whole_groups(to, dim) && even(angles) &&
                      aligned16(q_weight) && aligned16(k_weight);
    const int64_t groups = dim / (wide ? WIDE<T> : 2);
    const int lanes = power_of_two(groups < 32 ? groups : 32);
    if (groups > lanes * MAX_PER) return static_cast<int>(TWINFLOW_TOO_WIDE);
    const auto run = [&](auto kernel) {
      return launch(kernel, shape.batch * shape.seq, THREADS, how.stream, from, to, q_weight, k_weight, angles,
                    static_cast<int>(shape.seq), static_cast<int>(heads), static_cast<int>(dim), parts, lanes, eps);
    };
    return wide ? run(qk_norm_rope<T, WIDE<T>, 1>) : run(qk_norm_rope<T, 2, MAX_PER>);
  });
}

}  // namespace twinflow
