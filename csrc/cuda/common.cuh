// What the CUDA kernels share: storage types, 16-byte groups, rows of strided tensors, launches.
#pragma once

#include <cuda_bf16.h>
#include <cuda_runtime.h>

#include <cstdint>

#include "twinflow_rt.h"

namespace twinflow {

__device__ inline float load(float v) { return v; }
__device__ inline float load(__nv_bfloat16 v) { return __bfloat162float(v); }
__device__ inline void store(float* p, float v) { *p = v; }
__device__ inline void store(__nv_bfloat16* p, float v) { *p = __float2bfloat16_rn(v); }

// N elements moved in one instruction when N * sizeof(T) is 16.
template <class T, int N>
struct alignas(sizeof(T) * N) Group {
  T v[N];
};

// How many elements of T make 16 bytes.
template <class T>
constexpr int WIDE = 16 / sizeof(T);

// N float32 from global memory, 16 bytes at a time where N allows.
template <int N>
__device__ inline void read(const float* from, float* to) {
  constexpr int W = N < 4 ? N : 4;
#pragma unroll
  for (int i = 0; i < N; i += W) {
    const auto group = *reinterpret_cast<const Group<float, W>*>(from + i);
#pragma unroll
    for (int j = 0; j < W; ++j) to[i + j] = group.v[j];
  }
}

// N elements of storage as float32, and float32 rounded to storage.
template <int N, class T>
__device__ inline void read_as_float(const T* from, float* to) {
  const auto group = *reinterpret_cast<const Group<T, N>*>(from);
#pragma unroll
  for (int i = 0; i < N; ++i) to[i] = load(group.v[i]);
}

template <int N, class T>
__device__ inline void write_rounded(const float* from, T* to) {
  Group<T, N> group;
#pragma unroll
  for (int i = 0; i < N; ++i) store(&group.v[i], from[i]);
  *reinterpret_cast<Group<T, N>*>(to) = group;
}

// Rows of elements of type T, as twinflow_rows addresses them; and the weights of a sample, or null.
template <class T>
struct Rows {
  T* data;
  int64_t batch, row;
  explicit Rows(const twinflow_rows& rows) : data(static_cast<T*>(rows.data)), batch(rows.batch), row(rows.row) {}
  __device__ T* at(int64_t b, int64_t s) const { return data + b * batch + s * row; }
};

__device__ inline const float* at(const twinflow_weights& weights, int64_t b) {
  return weights.data ? weights.data + b * weights.batch : nullptr;
}

inline bool aligned16(const void* p) { return reinterpret_cast<uintptr_t>(p) % 16 == 0; }

template <class T>
bool whole_groups(const Rows<T>& rows, int64_t dim) {
  constexpr int64_t N = WIDE<T>;
  return aligned16(rows.data) && dim % N == 0 && rows.batch % N == 0 && rows.row % N == 0;
}

inline bool whole_groups(const twinflow_weights& w) { return aligned16(w.data) && w.batch % 4 == 0; }

inline int shape_error(const twinflow_shape& shape) {
  if (shape.batch < 0 || shape.seq < 0 || shape.dim < 1 || shape.dim > INT32_MAX) return TWINFLOW_BAD_SHAPE;
  return shape.seq > 0 && shape.batch > INT32_MAX / shape.seq ? TWINFLOW_BAD_SHAPE : TWINFLOW_OK;  // one block a row
}

// Runs `kernel` on `blocks` blocks (0: nothing to do) of `threads` threads.
template <class... P, class... A>
int launch(void (*kernel)(P...), int64_t blocks, int threads, void* stream, A... arguments) {
  if (blocks == 0) return TWINFLOW_OK;
  if (blocks > INT32_MAX) return TWINFLOW_BAD_SHAPE;
  cudaLaunchConfig_t config = {};
  config.gridDim = dim3(static_cast<unsigned>(blocks));
  config.blockDim = dim3(threads);
  config.stream = static_cast<cudaStream_t>(stream);
  const cudaError_t error = cudaLaunchKernelEx(&config, kernel, static_cast<P>(arguments)...);
  return error == cudaSuccess ? TWINFLOW_OK : TWINFLOW_CUDA_ERROR + static_cast<int>(error);
}

template <class F>
int typed(int dtype, F&& run) {
  if (dtype == TWINFLOW_F32) return run(float{});
  if (dtype == TWINFLOW_BF16) return run(__nv_bfloat16{});
  return TWINFLOW_BAD_DTYPE;
}

// What the table of the library holds.
#define KERNEL(name, ...) int launch_##name(__VA_ARGS__, twinflow_launch how);
#define KERNEL_CPU(name, ...)
#include "twinflow_kernels.h"

}  // namespace twinflow
