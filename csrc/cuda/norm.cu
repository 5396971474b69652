// The norm family: one block a row, the row held in registers, float32 statistics.

#include "common.cuh"

namespace twinflow {
namespace {

constexpr int MAX_THREADS = 512;  // leaves 128 registers a thread, so the widest rows do not spill
constexpr int MAX_GROUPS = 4;     // groups a thread holds

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
      if (at < dim) visit(v[g], at);
    }
  }

  template <class F>
  __device__ float sum_of(F&& f) const {
    float sum = 0;
#pragma unroll
    for (int g = 0; g < PER; ++g)
#pragma unroll
      for (int i = 0; i < N; ++i) sum += f(v[g][i]);
    return block_sum(sum);
  }

  __device__ void read(const T* row, int dim) {
#pragma unroll
    for (int g = 0; g < PER; ++g)
#pragma unroll
      for (int i = 0; i < N; ++i) v[g][i] = 0;
    each(dim, [&](float* mine, int at) { read_as_float<N>(row + at, mine); });
  }

  // v <- v rounded to T, and written
  __device__ void write(T* row, int dim) {
    each(dim, [&](float* mine, int at) {
      write_rounded<N>(mine, row + at);
#pragma unroll
      for (int i = 0; i < N; ++i) {
        T rounded;
        store(&rounded, mine[i]);
        mine[i] = load(rounded);
      }
    });
  }

  // v <- v - mean(v)
  __device__ void center(int dim) {
    const float mean = sum_of([](float x) { return x; }) / dim;
    each(dim, [&](float* mine, int) {
#pragma unroll
      for (int i = 0; i < N; ++i) mine[i] -= mean;
    });
  }

  // v <- v / sqrt(mean(v^2) + eps)
  __device__ void normalize(int dim, float eps) {
    const float factor = rsqrtf(sum_of([](float x) { return x * x; }) / dim + eps);
#pragma unroll
    for (int g = 0; g < PER; ++g)
#pragma unroll
      for (int i = 0; i < N; ++i) v[g][i] *= factor;
  }

  // v <- v * weight + bias, where there are any
  __device__ void scale(const float* weight, const float* bias, int dim) {
    each(dim, [&](float* mine, int at) {
      float w[N];
      if (weight) {
        twinflow::read<N>(weight + at, w);
#pragma unroll
        for (int i = 0; i < N; ++i) mine[i] *= w[i];
      }
      if (bias) {
        twinflow::read<N>(bias + at, w);
#pragma unroll
        for (int i = 0; i < N; ++i) mine[i] += w[i];
      }
    });
  }

  __device__ void add(const Share& other) {
#pragma unroll
    for (int g = 0; g < PER; ++g)
#pragma unroll
      for (int i = 0; i < N; ++i) v[g][i] += other.v[g][i];
  }
};

// Where the weights of an affine step are; either pointer may be null.
struct Affine {
  Weights weight, bias;
  __device__ const float* w(int64_t b) const { return weight.data ? weight.at(b) : nullptr; }
  __device__ const float* b(int64_t b) const { return bias.data ? bias.at(b) : nullptr; }
};

// out = normalised x, scaled. CENTER: layer norm, otherwise RMS norm.
// (One block a multiprocessor asked for, where a thread holds most: left to itself, the compiler spills on 8.6
// to fit a third.)
template <class T, int N, int PER, bool CENTER>
__global__ void __launch_bounds__(MAX_THREADS, PER == MAX_GROUPS ? 1 : 0)
    norm(Rows<const T> x, Affine affine, Rows<T> out, int seq, int dim, float eps) {
  const int64_t b = blockIdx.x / seq, s = blockIdx.x % seq;
  Share<T, N, PER> row;
  row.read(x.at(b, s), dim);
  if (CENTER) row.center(dim);
  row.normalize(dim, eps);
  row.scale(affine.w(b), affine.b(b), dim);
  row.write(out.at(b, s), dim);
}

// x_out = x + branch * gate (LAYER) or x + rms(branch) * gate; h_out = the norm of x_out that opens
// the next branch: layer norm (LAYER) or RMS norm.
template <class T, int N, int PER, bool LAYER>
__global__ void __launch_bounds__(MAX_THREADS)
    residual(Rows<const T> x, Rows<const T> branch, Weights gate, Affine next, Rows<T> x_out, Rows<T> h_out, int seq,
             int dim, float eps) {
  const int64_t b = blockIdx.x / seq, s = blockIdx.x % seq;
  Share<T, N, PER> row, old;
  row.read(branch.at(b, s), dim);
  old.read(x.at(b, s), dim);  // both loads are under way before the first sum waits for one
  if (!LAYER) row.normalize(dim, eps);
  row.scale(gate.data ? gate.at(b) : nullptr, nullptr, dim);
  row.add(old);
  row.write(x_out.at(b, s), dim);
  if (!h_out.data) return;
  if (LAYER) row.center(dim);
  row.normalize(dim, eps);
  row.scale(next.w(b), next.b(b), dim);
  row.write(h_out.at(b, s), dim);
}

template <int N, int PER>
struct Config {
  static constexpr int group = N, per = PER;
};

// `run(Config, threads)` with the groups per thread for rows of `dim`. Narrow groups, the unaligned
// case, have one instantiation: rare, and builds stay short.
template <class T, class F>
int with_config(bool wide, int64_t dim, F&& run) {
  const int64_t groups = wide ? dim / WIDE<T> : dim;
  const int64_t needed = (groups + MAX_THREADS - 1) / MAX_THREADS;
  if (needed > MAX_GROUPS) return TWINFLOW_TOO_WIDE;
  const int held = !wide ? MAX_GROUPS : needed <= 1 ? 1 : needed <= 2 ? 2 : MAX_GROUPS;
  const int threads = static_cast<int>(((groups + held - 1) / held + 31) / 32 * 32);
  if (!wide) return run(Config<1, MAX_GROUPS>{}, threads);
  if (held == 1) return run(Config<WIDE<T>, 1>{}, threads);
  if (held == 2) return run(Config<WIDE<T>, 2>{}, threads);
  return run(Config<WIDE<T>, MAX_GROUPS>{}, threads);
}

template <class T>
Rows<T> contiguous(void* data, const Shape& shape) {
  return {static_cast<T*>(data), shape.seq * shape.dim, shape.dim};
}

template <bool CENTER>
int launch_norm(const void* x, int64_t x_batch, int64_t x_row, Affine affine, bool complete, void* out, Shape shape,
                float eps, int dtype, void* stream) {
  if (shape.error()) return shape.error();
  if (shape.empty()) return TWINFLOW_OK;
  if (!(complete && x && out)) return TWINFLOW_NULL_POINTER;
  return typed(dtype, [&](auto kind) {
    using T = decltype(kind);
    const Rows<const T> in{static_cast<const T*>(x), x_batch, x_row};
    const Rows<T> to = contiguous<T>(out, shape);
    const bool wide = whole_groups(in, shape.dim) && whole_groups(to, shape.dim) && whole_groups(affine.weight) &&
                      whole_groups(affine.bias);
    return with_config<T>(wide, shape.dim, [&](auto config, int threads) {
      return launch(norm<T, config.group, config.per, CENTER>, shape.batch * shape.seq, threads, stream, in, affine, to,
                    static_cast<int>(shape.seq), static_cast<int>(shape.dim), eps);
    });
  });
}

template <bool LAYER>
int launch_residual(const void* x, int64_t x_batch, int64_t x_row, const void* branch, int64_t branch_batch,
                    int64_t branch_row, Weights gate, Affine next, bool complete, void* x_out, void* h_out, Shape shape,
                    float eps, int dtype, void* stream) {
  if (shape.error()) return shape.error();
  if (shape.empty()) return TWINFLOW_OK;
  if (!(complete && x && branch && x_out)) return TWINFLOW_NULL_POINTER;
  return typed(dtype, [&](auto kind) {
    using T = decltype(kind);
    const Rows<const T> in{static_cast<const T*>(x), x_batch, x_row};
    const Rows<const T> add{static_cast<const T*>(branch), branch_batch, branch_row};
    const Rows<T> sum = contiguous<T>(x_out, shape), h = contiguous<T>(h_out, shape);
    const bool wide = whole_groups(in, shape.dim) && whole_groups(add, shape.dim) && whole_groups(sum, shape.dim) &&
                      whole_groups(h, shape.dim) && whole_groups(gate) && whole_groups(next.weight) &&
                      whole_groups(next.bias);
    return with_config<T>(wide, shape.dim, [&](auto config, int threads) {
      return launch(residual<T, config.group, config.per, LAYER>, shape.batch * shape.seq, threads, stream, in, add,
                    gate, next, sum, h, static_cast<int>(shape.seq), static_cast<int>(shape.dim), eps);
    });
  });
}

}  // namespace
}  // namespace twinflow

using namespace twinflow;

int twinflow_cuda_rms_norm(const void* x, int64_t x_batch, int64_t x_row, const float* weight, int64_t weight_batch,
                           void* out, int64_t batch, int64_t seq, int64_t dim, float eps, int dtype, void* stream) {
  return launch_norm<false>(x, x_batch, x_row, {{weight, weight_batch}, {}}, weight, out, {batch, seq, dim}, eps, dtype,
                            stream);
}

int twinflow_cuda_layer_norm(const void* x, int64_t x_batch, int64_t x_row, const float* weight, int64_t weight_batch,
                             const float* bias, int64_t bias_batch, void* out, int64_t batch, int64_t seq, int64_t dim,
                             float eps, int dtype, void* stream) {
  return launch_norm<true>(x, x_batch, x_row, {{weight, weight_batch}, {bias, bias_batch}}, true, out,
                           {batch, seq, dim}, eps, dtype, stream);
}

int twinflow_cuda_residual_norm(const void* x, int64_t x_batch, int64_t x_row, const void* branch, int64_t branch_batch,
                                int64_t branch_row, const float* post, int64_t post_batch, const float* pre,
                                int64_t pre_batch, void* x_out, void* h_out, int64_t batch, int64_t seq, int64_t dim,
                                float eps, int dtype, void* stream) {
  return launch_residual<false>(x, x_batch, x_row, branch, branch_batch, branch_row, {post, post_batch},
                                {{pre, pre_batch}, {}}, post && !pre == !h_out, x_out, h_out, {batch, seq, dim}, eps,
                                dtype, stream);
}

int twinflow_cuda_residual_layer_norm(const void* x, int64_t x_batch, int64_t x_row, const void* branch,
                                      int64_t branch_batch, int64_t branch_row, const float* gate, int64_t gate_batch,
                                      const float* weight, int64_t weight_batch, const float* bias, int64_t bias_batch,
                                      void* x_out, void* h_out, int64_t batch, int64_t seq, int64_t dim, float eps,
                                      int dtype, void* stream) {
  return launch_residual<true>(x, x_batch, x_row, branch, branch_batch, branch_row, {gate, gate_batch},
                               {{weight, weight_batch}, {bias, bias_batch}}, h_out, x_out, h_out, {batch, seq, dim},
                               eps, dtype, stream);
}
