// Activations of the feed-forward blocks: a thread, 16 bytes of a row of the output; quantized, a block a row.

#include "rows.cuh"

namespace twinflow {
namespace {

constexpr int THREADS = 256;
constexpr int WIDEST = 40;  // elements of a row that a thread holds: Qwen2.5-VL's MLP has 18944

// e^x to float32 precision for float32 storage; the hardware's (2 ulp) disappears in bfloat16's rounding.
__device__ inline float exponential(float, float x) { return expf(x); }
__device__ inline float exponential(__nv_bfloat16, float x) { return __expf(x); }

// silu(a), or tanh-GELU of a: x * logistic(2u), the same function as x / 2 * (1 + tanh(u)), without cancellation.
template <class T, bool GATED>
__device__ inline float activate(float a) {
  const float u = GATED ? a : 1.5957691216057308f * (a + 0.044715f * a * a * a);
  return a / (1.0f + exponential(T{}, -u));
}

// silu(a) * b (GATED, b being the second half of a row of 2 * width) or tanh-GELU of a.
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
    y[i] = activate<T, GATED>(a[i]);
    if (GATED) y[i] *= b[i];
  }
  write_rounded<N>(y, out + row * width + at);
}

// The same without rounding to storage, in 8 bits.
template <class T, int N, int PER, bool GATED>
__global__ void __launch_bounds__(MAX_THREADS) activation_quantized(const T* x, Quantized to, int width) {
  const T* source = x + static_cast<int64_t>(blockIdx.x) * width * (GATED ? 2 : 1);
  Share<T, N, PER> row;
  row.read(source, width);
  if constexpr (GATED) {
    Share<T, N, PER> gate;
    gate.read(source + width, width);  // both loads are under way before the first is needed
    row.with(gate, [](float a, float b) { return activate<T, true>(a) * b; });
  } else {
    row.with(row, [](float a, float) { return activate<T, false>(a); });
  }
  to.put(row, blockIdx.x, width);
}

template <bool GATED>
int activate_rows(const void* x, const twinflow_out& out, int64_t rows, int64_t width, const twinflow_launch& how) {
  if (rows < 0 || width < 1 || width > INT32_MAX / 2) return TWINFLOW_BAD_SHAPE;
  if (rows == 0) return TWINFLOW_OK;
  if (!(x && complete(out))) return TWINFLOW_NULL_POINTER;
  return to_rows(out, [&](auto to) {
    return typed(how.dtype, [&](auto kind) {
      using T = decltype(kind);
      const T* from = static_cast<const T*>(x);
      const bool wide = width % WIDE<T> == 0 && aligned16(x) && to.wide();
      if constexpr (std::is_same_v<decltype(to), Quantized>)
        return with_config<T, WIDEST>(wide, width, [&](auto config, int threads) {
          return launch(activation_quantized<T, config.group, config.per, GATED>, rows, threads, how.stream, from, to,
                        static_cast<int>(width));
        });
      const int64_t piece = THREADS * (wide ? WIDE<T> : 1), pieces = (width + piece - 1) / piece;
      if (rows > INT32_MAX / pieces) return static_cast<int>(TWINFLOW_BAD_SHAPE);
      const auto run = [&](auto kernel) {
        return launch(kernel, rows * pieces, THREADS, how.stream, from, static_cast<T*>(out.data),
                      static_cast<int>(pieces), static_cast<int>(width));
      };
      return wide ? run(activation<T, WIDE<T>, GATED>) : run(activation<T, 1, GATED>);
    });
  });
}

}  // namespace

int launch_swiglu(const void* x, twinflow_out out, int64_t rows, int64_t width, twinflow_launch how) {
  return activate_rows<true>(x, out, rows, width, how);
}

int launch_gelu_tanh(const void* x, twinflow_out out, int64_t rows, int64_t width, twinflow_launch how) {
  return activate_rows<false>(x, out, rows, width, how);
}

}  // namespace twinflow
