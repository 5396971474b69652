// x0_project: the closing step of the sampler, elementwise.

#include "common.cuh"

namespace twinflow {
namespace {

constexpr int THREADS = 256;

template <class T, int N>
__global__ void __launch_bounds__(THREADS) x0_project(const T* x, const T* velocity, T* out, int64_t n, float t) {
  const int64_t at = (blockIdx.x * static_cast<int64_t>(THREADS) + threadIdx.x) * N;
  if (at >= n) return;
  float a[N], f[N];
  read_as_float<N>(x + at, a);
  read_as_float<N>(velocity + at, f);
#pragma unroll
  for (int i = 0; i < N; ++i) a[i] -= t * f[i];
  write_rounded<N>(a, out + at);
}

}  // namespace

int launch_x0_project(const void* x, const void* velocity, void* out, int64_t n, float t, twinflow_launch how) {
  if (n < 0) return TWINFLOW_BAD_SHAPE;
  if (n == 0) return TWINFLOW_OK;
  if (!(x && velocity && out)) return TWINFLOW_NULL_POINTER;
  return typed(how.dtype, [&](auto kind) {
    using T = decltype(kind);
    const bool wide = n % WIDE<T> == 0 && aligned16(x) && aligned16(velocity) && aligned16(out);
    const int64_t threads = n / (wide ? WIDE<T> : 1), blocks = (threads + THREADS - 1) / THREADS;
    const auto run = [&](auto kernel) {
      return launch(kernel, blocks, THREADS, how.stream, static_cast<const T*>(x), static_cast<const T*>(velocity),
                    static_cast<T*>(out), n, t);
    };
    return wide ? run(x0_project<T, WIDE<T>>) : run(x0_project<T, 1>);
  });
}

}  // namespace twinflow
