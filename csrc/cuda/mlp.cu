// Activations of the feed-forward blocks: a thread, 16 bytes of a row of the output.

#include "common.cuh"

namespace twinflow {
namespace {

constexpr int THREADS = 256;

// e^x to float32 precision for float32 storage; the hardware's (2 ulp) disappears in bfloat16's rounding.
__device__ inline float exponential(float, float x) { return expf(x); }
__device__ inline float exponential(__nv_bfloat16, float x) { return __expf(x); }

// silu(a) * b (GATED, the second half of a row of 2 * width) or tanh-GELU of a: x * logistic(2u), the
// same function as x / 2 * (1 + tanh(u)), without cancellation.
template <class T, int N, bool GATED>
__global__ void __launch_bounds__(THREADS) activation(const T* x, T* out, int pieces, int width) {
  const int64_t row = blockIdx.x / pieces;
  const int at = (static_cast<int>(blockIdx.x % pieces) * THREADS + threadIdx.x) * N;
  if (at >= width) return;
  const T* source = x + row * width * (GATED ? 2 : 1) + at;
  float a[N], b[N], y[N];
  read_as_float<N>(source, a);
  if (GATED) read_as_float<N>(source + width, b);
#pragma unroll
  for (int i = 0; i < N; ++i) {
    const float u = GATED ? a[i] : 1.5957691216057308f * (a[i] + 0.044715f * a[i] * a[i] * a[i]);
    y[i] = a[i] / (1.0f + exponential(T{}, -u));
    if (GATED) y[i] *= b[i];
  }
  write_rounded<N>(y, out + row * width + at);
}

template <bool GATED>
int launch_activation(const void* x, void* out, int64_t rows, int64_t width, int dtype, void* stream) {
  if (rows < 0 || width < 1 || width > INT32_MAX / 2) return TWINFLOW_BAD_SHAPE;
  if (rows == 0) return TWINFLOW_OK;
  if (!(x && out)) return TWINFLOW_NULL_POINTER;
  return typed(dtype, [&](auto kind) {
    using T = decltype(kind);
    const bool wide = width % WIDE<T> == 0 && aligned16(x) && aligned16(out);
    const int64_t piece = THREADS * (wide ? WIDE<T> : 1), pieces = (width + piece - 1) / piece;
    if (rows > INT32_MAX / pieces) return static_cast<int>(TWINFLOW_BAD_SHAPE);
    const auto run = [&](auto kernel) {
      return launch(kernel, rows * pieces, THREADS, stream, static_cast<const T*>(x), static_cast<T*>(out),
                    static_cast<int>(pieces), static_cast<int>(width));
    };
    return wide ? run(activation<T, WIDE<T>, GATED>) : run(activation<T, 1, GATED>);
  });
}

}  // namespace
}  // namespace twinflow

int twinflow_cuda_swiglu(const void* x, void* out, int64_t rows, int64_t hidden, int dtype, void* stream) {
  return twinflow::launch_activation<true>(x, out, rows, hidden, dtype, stream);
}

int twinflow_cuda_gelu_tanh(const void* x, void* out, int64_t rows, int64_t width, int dtype, void* stream) {
  return twinflow::launch_activation<false>(x, out, rows, width, dtype, stream);
}
