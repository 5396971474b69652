// Kernels that hold a row in a block's registers: its parts, sums over it, and where it goes.
#pragma once

#include <cuda_fp8.h>

#include "common.cuh"

namespace twinflow {

constexpr int MAX_THREADS = 512;  // leaves 128 registers a thread, so the widest rows do not spill
constexpr int HELD = 32;          // elements of a row that a thread holds at most; of two rows it may hold both

// All threads' values combined by `f`; every thread gets the result.
template <class V, class F>
__device__ V block_fold(V v, F&& f) {
  __shared__ V warps[MAX_THREADS / 32];
  for (int step = 16; step; step /= 2) v = f(v, __shfl_xor_sync(~0u, v, step));
  __syncthreads();  // the previous result has been read
  if (threadIdx.x % 32 == 0) warps[threadIdx.x / 32] = v;
  __syncthreads();
  V all = warps[0];
  for (int i = 1; i < static_cast<int>(blockDim.x) / 32; ++i) all = f(all, warps[i]);
  return all;
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
    return block_fold(sum, [](float a, float b) { return a + b; });
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

  // The largest magnitude of the row. Magnitudes are ordered as their bits are, with NaN above all: a row that
  // holds one has it as its largest.
  __device__ float largest() const {
    unsigned top = 0;
#pragma unroll
    for (int g = 0; g < PER; ++g)
#pragma unroll
      for (int i = 0; i < N; ++i) top = max(top, __float_as_uint(fabsf(v[g][i])));
    return __uint_as_float(block_fold(top, [](unsigned a, unsigned b) { return max(a, b); }));
  }

  // v <- f(v, other), elementwise
  template <class F>
  __device__ void with(const Share& other, F&& f) {
#pragma unroll
    for (int g = 0; g < PER; ++g)
#pragma unroll
      for (int i = 0; i < N; ++i) v[g][i] = f(v[g][i], other.v[g][i]);
  }
};

// Where a kernel's rows go, contiguous: to storage,
struct Stored {
  void* data;

  bool wide() const { return aligned16(data); }
  __device__ bool wanted() const { return data; }

  template <class T, int N, int PER>
  __device__ void put(Share<T, N, PER>& row, int64_t r, int dim) const {
    row.write(static_cast<T*>(data) + r * dim, dim);
  }
};

// or to 8 bits with a scale each: values = round(v / scale), scale = max |v| / limit.
struct Quantized {
  void* values;
  float* scales;
  int format;  // TWINFLOW_I8 or TWINFLOW_E4M3

  bool wide() const { return aligned16(values); }
  __device__ bool wanted() const { return true; }

  // Integers beyond the limit do not occur: |v| * (limit / top) is at most half a unit in the last place above it.
  template <int N>
  __device__ void write(const float* from, float factor, uint8_t* to) const {
    Group<uint8_t, N> group;
    if (format == TWINFLOW_E4M3) {
#pragma unroll
      for (int i = 0; i < N; ++i) group.v[i] = __nv_cvt_float_to_fp8(from[i] * factor, __NV_SATFINITE, __NV_E4M3);
    } else {
#pragma unroll
      for (int i = 0; i < N; ++i) group.v[i] = static_cast<uint8_t>(__float2int_rn(from[i] * factor));
    }
    *reinterpret_cast<Group<uint8_t, N>*>(to) = group;
  }

  template <class T, int N, int PER>
  __device__ void put(Share<T, N, PER>& row, int64_t r, int dim) const {
    const float limit = format == TWINFLOW_E4M3 ? 448.0f : 127.0f, largest = row.largest();
    const float top = largest < 1e-12f ? 1e-12f : largest;  // NaN stays
    const float factor = limit / top;  // to nearest: one unit less, and values half way between codes go astray
    uint8_t* to = static_cast<uint8_t*>(values) + r * dim;
    row.each(dim, [&](float* mine, int at) { write<N>(mine, factor, to + at); });
    if (threadIdx.x == 0) scales[r] = top / limit;
  }
};

inline bool complete(const twinflow_out& out) { return out.data && (out.format == TWINFLOW_STORED || out.scales); }

// `run(Stored)` or `run(Quantized)`, as `out` asks.
template <class F>
int to_rows(const twinflow_out& out, F&& run) {
  if (out.format == TWINFLOW_STORED) return run(Stored{out.data});
  if (out.format != TWINFLOW_I8 && out.format != TWINFLOW_E4M3) return TWINFLOW_BAD_DTYPE;
  return run(Quantized{out.data, out.scales, out.format});
}

template <int N, int PER>
struct Config {
  static constexpr int group = N, per = PER;
};

// `run(Config, threads)` with the groups per thread for rows of `dim`, at most ELEMENTS of which a thread holds.
// Narrow groups, the unaligned case, have one instantiation: rare, and builds stay short.
template <class T, int ELEMENTS = HELD, class F>
int with_config(bool wide, int64_t dim, F&& run) {
  constexpr int N = WIDE<T>, MOST = ELEMENTS / N, MOST_NARROW = 4;
  const int64_t groups = wide ? dim / N : dim;
  const int64_t needed = (groups + MAX_THREADS - 1) / MAX_THREADS;
  if (needed > (wide ? MOST : MOST_NARROW)) return TWINFLOW_TOO_WIDE;
  const int held = !wide ? MOST_NARROW : needed <= 1 ? 1 : needed <= 2 ? 2 : MOST;
  const int threads = static_cast<int>(((groups + held - 1) / held + 31) / 32 * 32);
  if (!wide) return run(Config<1, MOST_NARROW>{}, threads);
  if (held == 1) return run(Config<N, 1>{}, threads);
  if (held == 2) return run(Config<N, 2>{}, threads);
  return run(Config<N, MOST>{}, threads);
}

}  // namespace twinflow
