// rms_norm and residual_norm: one block a row, the row held in registers, float32 statistics.

#include "common.cuh"

namespace twinflow {
namespace {

constexpr int MAX_THREADS = 512;  // leaves 128 registers a thread, so the widest rows do not spill
constexpr int MAX_GROUPS = 4;     // 16-byte groups a thread holds

// The batch and row of a [batch, seq, dim] tensor, and the weights of one of its samples.
template <class T>
struct Rows {
  T* data;
  int64_t batch, row;
  __device__ T* at(int64_t b, int64_t s) const { return data + b * batch + s * row; }
};

struct Weights {
  const float* data;
  int64_t batch;
  __device__ const float* at(int64_t b) const { return data + b * batch; }
};

// Sum over the block; every thread gets it.
__device__ float block_sum(float v) {
  __shared__ float warps[MAX_THREADS / 32];
  for (int step = 16; step; step /= 2) v += __shfl_xor_sync(~0u, v, step);
  __syncthreads();  // the previous sum has been read
  if (threadIdx.x % 32 == 0) warps[threadIdx.x / 32] = v;
  __syncthreads();
  float total = 0;
  for (int i = 0; i < static_cast<int>(blockDim.x) / 32; ++i) total += warps[i];
  return total;
}

// This thread's share of a row: PER groups of N elements, blockDim.x groups apart. Past the end: 0.
template <class T, int N, int PER>
struct Share {
  float v[PER][N];

  template <class F>
  __device__ void each(int dim, F&& visit) {
#pragma unroll
    for (int g = 0; g < PER; ++g) {
      const int at = (g * blockDim.x + threadIdx.x) * N;
      if (at < dim) visit(g, at);
    }
  }

  __device__ void read(const T* row, int dim) {
#pragma unroll
    for (int g = 0; g < PER; ++g)
#pragma unroll
      for (int i = 0; i < N; ++i) v[g][i] = 0;
    each(dim, [&](int g, int at) {
      const auto group = *reinterpret_cast<const Group<T, N>*>(row + at);
#pragma unroll
      for (int i = 0; i < N; ++i) v[g][i] = load(group.v[i]);
    });
  }

  // v <- v rounded to T, and written
  __device__ void write(T* row, int dim) {
    each(dim, [&](int g, int at) {
      Group<T, N> group;
#pragma unroll
      for (int i = 0; i < N; ++i) {
        store(&group.v[i], v[g][i]);
        v[g][i] = load(group.v[i]);
      }
      *reinterpret_cast<Group<T, N>*>(row + at) = group;
    });
  }

  // v <- v / sqrt(mean(v^2) + eps) * weight
  __device__ void normalize(const float* weight, int dim, float eps) {
    float sum = 0;
#pragma unroll
    for (int g = 0; g < PER; ++g)
#pragma unroll
      for (int i = 0; i < N; ++i) sum += v[g][i] * v[g][i];
    const float factor = rsqrtf(block_sum(sum) / dim + eps);
    each(dim, [&](int g, int at) {
      constexpr int W = N < 4 ? N : 4;
#pragma unroll
      for (int i = 0; i < N; i += W) {
        const auto w = *reinterpret_cast<const Group<float, W>*>(weight + at + i);
#pragma unroll
        for (int j = 0; j < W; ++j) v[g][i + j] *= factor * w.v[j];
      }
    });
  }
};

template <class T, int N, int PER>
__global__ void __launch_bounds__(MAX_THREADS)
    rms_norm(Rows<const T> x, Weights weight, Rows<T> out, int seq, int dim, float eps) {
  const int64_t b = blockIdx.x / seq, s = blockIdx.x % seq;
  Share<T, N, PER> row;
  row.read(x.at(b, s), dim);
  row.normalize(weight.at(b), dim, eps);
  row.write(out.at(b, s), dim);
}

template <class T, int N, int PER>
__global__ void __launch_bounds__(MAX_THREADS)
    residual_norm(Rows<const T> x, Rows<const T> branch, Weights post, Weights pre, Rows<T> x_out, Rows<T> h_out,
                  int seq, int dim, float eps) {
  const int64_t b = blockIdx.x / seq, s = blockIdx.x % seq;
  Share<T, N, PER> sum, old;
  sum.read(branch.at(b, s), dim);
  old.read(x.at(b, s), dim);
  sum.normalize(post.at(b), dim, eps);
#pragma unroll
  for (int g = 0; g < PER; ++g)
#pragma unroll
    for (int i = 0; i < N; ++i) sum.v[g][i] += old.v[g][i];
  sum.write(x_out.at(b, s), dim);
  if (!h_out.data) return;
  sum.normalize(pre.at(b), dim, eps);
  sum.write(h_out.at(b, s), dim);
}

struct Shape {
  int64_t batch, seq, dim;
  int error() const {
    if (batch < 0 || seq < 0 || dim < 1 || dim > INT32_MAX || batch * seq > INT32_MAX) return TWINFLOW_BAD_SHAPE;
    return TWINFLOW_OK;
  }
};

template <int N, int PER>
struct Config {
  static constexpr int group = N, per = PER;
};

// Threads and groups per thread for rows of `dim`, as compile-time constants given to `launch`.
template <int N, class F>
int with_groups(int64_t dim, F&& launch) {
  const int64_t groups = (dim + N - 1) / N;
  const int64_t per = (groups + MAX_THREADS - 1) / MAX_THREADS;
  if (per > MAX_GROUPS) return TWINFLOW_TOO_WIDE;
  const int held = per <= 1 ? 1 : per <= 2 ? 2 : 4;
  const int threads = static_cast<int>(((groups + held - 1) / held + 31) / 32 * 32);
  if (held == 1) launch(Config<N, 1>{}, threads);
  if (held == 2) launch(Config<N, 2>{}, threads);
  if (held == 4) launch(Config<N, 4>{}, threads);
  return launched();
}

template <class T, class F>
int with_config(bool vectors, int64_t dim, F&& launch) {
  return vectors ? with_groups<16 / sizeof(T)>(dim, launch) : with_groups<1>(dim, launch);
}

template <class T>
bool whole_groups(const Rows<T>& rows, int64_t dim) {
  constexpr int64_t N = 16 / sizeof(T);
  return aligned16(rows.data) && dim % N == 0 && rows.batch % N == 0 && rows.row % N == 0;
}

bool whole_groups(const Weights& w) { return aligned16(w.data) && w.batch % 4 == 0; }

template <class T>
Rows<T> contiguous(void* data, const Shape& shape) {
  return {static_cast<T*>(data), shape.seq * shape.dim, shape.dim};
}

}  // namespace
}  // namespace twinflow

using namespace twinflow;

int twinflow_cuda_rms_norm(const void* x, int64_t x_batch, int64_t x_row, const float* weight, int64_t weight_batch,
                           void* out, int64_t batch, int64_t seq, int64_t dim, float eps, int dtype, void* stream) {
  const Shape shape{batch, seq, dim};
  if (shape.error()) return shape.error();
  if (batch * seq == 0) return TWINFLOW_OK;
  if (!(x && weight && out)) return TWINFLOW_NULL_POINTER;
  return typed(dtype, [&](auto kind) {
    using T = decltype(kind);
    const Rows<const T> in{static_cast<const T*>(x), x_batch, x_row};
    const Rows<T> to = contiguous<T>(out, shape);
    const Weights w{weight, weight_batch};
    const bool vectors = whole_groups(in, dim) && whole_groups(to, dim) && whole_groups(w);
    return with_config<T>(vectors, dim, [&](auto config, int threads) {
      rms_norm<T, config.group, config.per>
          <<<batch * seq, threads, 0, static_cast<cudaStream_t>(stream)>>>(in, w, to, seq, dim, eps);
    });
  });
}

int twinflow_cuda_residual_norm(const void* x, int64_t x_batch, int64_t x_row, const void* branch,
                                int64_t branch_batch, int64_t branch_row, const float* post, int64_t post_batch,
                                const float* pre, int64_t pre_batch, void* x_out, void* h_out, int64_t batch,
                                int64_t seq, int64_t dim, float eps, int dtype, void* stream) {
  const Shape shape{batch, seq, dim};
  if (shape.error()) return shape.error();
  if (batch * seq == 0) return TWINFLOW_OK;
  if (!(x && branch && post && x_out) || !pre != !h_out) return TWINFLOW_NULL_POINTER;
  return typed(dtype, [&](auto kind) {
    using T = decltype(kind);
    const Rows<const T> in{static_cast<const T*>(x), x_batch, x_row};
    const Rows<const T> add{static_cast<const T*>(branch), branch_batch, branch_row};
    const Rows<T> sum = contiguous<T>(x_out, shape), next = contiguous<T>(h_out, shape);
    const Weights after{post, post_batch}, before{pre, pre_batch};
    const bool vectors = whole_groups(in, dim) && whole_groups(add, dim) && whole_groups(sum, dim) &&
                         whole_groups(next, dim) && whole_groups(after) && whole_groups(before);
    return with_config<T>(vectors, dim, [&](auto config, int threads) {
      residual_norm<T, config.group, config.per><<<batch * seq, threads, 0, static_cast<cudaStream_t>(stream)>>>(
          in, add, after, before, sum, next, seq, dim, eps);
    });
  });
}
