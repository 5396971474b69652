// What the library says about itself and about the machine.

#include "common.cuh"

namespace twinflow {
namespace {
__global__ void probe() {}
}  // namespace
}  // namespace twinflow

int twinflow_cuda_abi_version(void) { return TWINFLOW_ABI_VERSION; }

const twinflow_kernels* twinflow_cuda_kernels(void) {
  using namespace twinflow;
  static const twinflow_kernels table = {
#define KERNEL(name, ...) launch_##name,
#define KERNEL_CPU(name, ...) nullptr,
#include "twinflow_kernels.h"
  };
  return &table;
}

int twinflow_cuda_usable(void) {
  cudaFuncAttributes attributes;  // asks the driver to find code for the current device
  const cudaError_t error = cudaFuncGetAttributes(&attributes, twinflow::probe);
  if (error == cudaSuccess) return TWINFLOW_OK;
  cudaGetLastError();  // the answer is the return value: leave no error behind
  return TWINFLOW_CUDA_ERROR + static_cast<int>(error);
}

const char* twinflow_cuda_error_message(int status) {
  if (status >= TWINFLOW_CUDA_ERROR) return cudaGetErrorString(static_cast<cudaError_t>(status - TWINFLOW_CUDA_ERROR));
  switch (status) {
    case TWINFLOW_OK: return "no error";
    case TWINFLOW_NULL_POINTER: return "a required pointer is NULL";
    case TWINFLOW_BAD_SHAPE: return "a size or stride is out of range for this kernel";
    case TWINFLOW_BAD_DTYPE: return "the dtype is none of twinflow_dtype, or the format none of twinflow_format";
    case TWINFLOW_TOO_WIDE: return "rows are too wide for this kernel; see twinflow_rt.h";
    default: return "unknown status";
  }
}
