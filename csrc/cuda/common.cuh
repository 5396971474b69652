// What the CUDA kernels share: storage types, 16-byte groups, launch status.
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

inline bool aligned16(const void* p) { return reinterpret_cast<uintptr_t>(p) % 16 == 0; }

inline int launched() {
  const cudaError_t error = cudaGetLastError();
  return error == cudaSuccess ? TWINFLOW_OK : TWINFLOW_CUDA_ERROR + static_cast<int>(error);
}

template <class F>
int typed(int dtype, F&& run) {
  if (dtype == TWINFLOW_F32) return run(float{});
  if (dtype == TWINFLOW_BF16) return run(__nv_bfloat16{});
  return TWINFLOW_BAD_DTYPE;
}

}  // namespace twinflow
