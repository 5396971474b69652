// What quantized linear layers read, rows in 8 bits, and what becomes of the sums they give.

#include "rows.cuh"

namespace twinflow {
namespace {

constexpr int THREADS = 256;

template <class T, int N, int PER>
__global__ void __launch_bounds__(MAX_THREADS) quantize(Rows<const T> x, Quantized to, int seq, int dim) {
  Share<T, N, PER> row;
  row.read(x.at(blockIdx.x / seq, blockIdx.x % seq), dim);
  to.put(row, blockIdx.x, dim);
}

// A thread: N sums of a row, N * 4 bytes.
template <class T, int N>
__global__ void __launch_bounds__(THREADS) dequantize(const int32_t* sums, const float* x_scales, const float* w_scales,
                                                      const T* bias, T* out, int pieces, int columns) {
  const int64_t row = blockIdx.x / pieces;
  const int at = (static_cast<int>(blockIdx.x % pieces) * THREADS + threadIdx.x) * N;
  if (at >= columns) return;
  const auto group = *reinterpret_cast<const Group<int32_t, N>*>(sums + row * columns + at);
  const float scale = x_scales[row];
  float w[N], y[N];
  read<N>(w_scales + at, w);
#pragma unroll
  for (int i = 0; i < N; ++i) y[i] = static_cast<float>(group.v[i]) * scale * w[i];
  if (bias) {
    read_as_float<N>(bias + at, w);
#pragma unroll
    for (int i = 0; i < N; ++i) y[i] += w[i];
  }
  write_rounded<N>(y, out + row * columns + at);
}

}  // namespace
}  // namespace twinflow

using namespace twinflow;

int twinflow_cuda_quantize_rows(const void* x, int64_t x_batch, int64_t x_row, void* values, float* scales,
                                int64_t batch, int64_t seq, int64_t dim, int format, int dtype, void* stream) {
  const Shape shape{batch, seq, dim};
  const Quantized to{values, scales, format};
  if (shape.error()) return shape.error();
  if (shape.empty()) return TWINFLOW_OK;
  if (!(x && to.complete())) return TWINFLOW_NULL_POINTER;
  if (to.error()) return to.error();
  return typed(dtype, [&](auto kind) {
    using T = decltype(kind);
    const Rows<const T> in{static_cast<const T*>(x), x_batch, x_row};
    return with_config<T>(whole_groups(in, dim) && to.wide(), dim, [&](auto config, int threads) {
      return launch(quantize<T, config.group, config.per>, batch * seq, threads, stream, in, to, static_cast<int>(seq),
                    static_cast<int>(dim));
    });
  });
}

int twinflow_cuda_dequantize(const int32_t* sums, const float* x_scales, const float* w_scales, const void* bias,
                             void* out, int64_t rows, int64_t columns, int dtype, void* stream) {
  if (rows < 0 || columns < 1 || columns > INT32_MAX / 2) return TWINFLOW_BAD_SHAPE;
  if (rows == 0) return TWINFLOW_OK;
  if (!(sums && x_scales && w_scales && out)) return TWINFLOW_NULL_POINTER;
  return typed(dtype, [&](auto kind) {
    using T = decltype(kind);
    const bool wide = columns % 4 == 0 && aligned16(sums) && aligned16(w_scales) && aligned16(bias) && aligned16(out);
    const int64_t piece = THREADS * (wide ? 4 : 1), pieces = (columns + piece - 1) / piece;
    if (rows > INT32_MAX / pieces) return static_cast<int>(TWINFLOW_BAD_SHAPE);
    const auto run = [&](auto kernel) {
      return launch(kernel, rows * pieces, THREADS, stream, sums, x_scales, w_scales, static_cast<const T*>(bias),
                    static_cast<T*>(out), static_cast<int>(pieces), static_cast<int>(columns));
    };
    return wide ? run(dequantize<T, 4>) : run(dequantize<T, 1>);
  });
}
