// Picks the kernels for this CPU once, and what else the library says and does.

#include "kernels.h"
#include "threads.h"

// Of OpenMP 5.0; weak, because a runtime may lack it, or there be none.
extern "C" __attribute__((weak)) int omp_pause_resource_all(int kind);

namespace {

struct choice {
  const char* isa;
  const twinflow_kernels& kernels;
};

choice choose() {
#ifdef TWINFLOW_X86
  __builtin_cpu_init();
  if (__builtin_cpu_supports("avx512f") && __builtin_cpu_supports("avx512bw") && __builtin_cpu_supports("avx512dq") &&
      __builtin_cpu_supports("avx512vl"))
    return {"avx512", twinflow_kernels_avx512()};
  if (__builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma")) return {"avx2", twinflow_kernels_avx2()};
#endif
  return {"baseline", twinflow_kernels_baseline()};
}

const choice& chosen() {
  static const choice once = choose();
  return once;
}

}  // namespace

int twinflow_abi_version(void) { return TWINFLOW_ABI_VERSION; }

const twinflow_kernels* twinflow_cpu_kernels(void) { return &chosen().kernels; }

const char* twinflow_cpu_isa(void) { return chosen().isa; }

const char* twinflow_error_message(int status) {
  switch (status) {
    case TWINFLOW_OK: return "no error";
    case TWINFLOW_NULL_POINTER: return "a required pointer is NULL";
    case TWINFLOW_BAD_SHAPE: return "a size or stride is out of range for this kernel";
    case TWINFLOW_BAD_DTYPE: return "the dtype is none of twinflow_dtype, or the format none that these kernels write";
    case TWINFLOW_TOO_WIDE: return "rows are too wide for this kernel; see twinflow_rt.h";
    default: return status >= TWINFLOW_CUDA_ERROR ? "CUDA refused the launch" : "unknown status";
  }
}

int twinflow_cpu_release_threads(void) {
  constexpr int soft = 1;  // omp_pause_soft: what can be made again
  if (!omp_pause_resource_all || omp_pause_resource_all(soft) != 0) return -1;
  forget_team();
  return 0;
}

int twinflow_cpu_threads_apart(int threads) { return part_team(threads); }

int twinflow_cpu_threads_together(void) { return join_team(); }
