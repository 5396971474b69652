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

int launch_quantize_rows(twinflow_rows x, twinflow_out out, twinflow_shape shape, twinflow_launch how) {
  const int64_t rows = shape.batch * shape.seq;
  if (const int error = shape_error(shape)) return error;
  if (rows == 0) return TWINFLOW_OK;
  if (!(x.data && complete(out))) return TWINFLOW_NULL_POINTER;
  if (out.format != TWINFLOW_I8 && out.format != TWINFLOW_E4M3) return TWINFLOW_BAD_DTYPE;
  return typed(how.dtype, [&](auto kind) {
    using T = decltype(kind);
    const Rows<const T> in(x);
    const Quantized to{out.data, out.scales, out.format};
    return with_config<T>(whole_groups(in, shape.dim) && to.wide(), shape.dim, [&](auto config, int threads) {
      return launch(quantize<T, config.group, config.per>, rows, threads, how.stream, in, to,
                    static_cast<int>(shape.seq), static_cast<int>(shape.dim));
    });
  });
}

int launch_dequantize(const int32_t* sums, const float* x_scales, const float* w_scales, const void* bias, void* out,
                      int64_t rows, int64_t columns, twinflow_launch how) {
  if (rows < 0 || columns < 1 || columns > INT32_MAX / 2) return TWINFLOW_BAD_SHAPE;
  if (rows == 0) return TWINFLOW_OK;
  if (!(sums && x_scales && w_scales && out)) return TWINFLOW_NULL_POINTER;
  return typed(how.dtype, [&](auto kind) {
    using T = decltype(kind);
    const bool wide = columns % 4 == 0 && aligned16(sums) && aligned16(w_scales) && aligned16(bias) && aligned16(out);
    const int64_t piece = THREADS * (wide ? 4 : 1), pieces = (columns + piece - 1) / piece;
    if (rows > INT32_MAX / pieces) return static_cast<int>(TWINFLOW_BAD_SHAPE);
    const auto run = [&](auto kernel) {
      return launch(kernel, rows * pieces, THREADS, how.stream, sums, x_scales, w_scales, static_cast<const T*>(bias),
                    static_cast<T*>(out), static_cast<int>(pieces), static_cast<int>(columns));
    };
    return wide ? run(dequantize<T, 4>) : run(dequantize<T, 1>);
  });
}

}  // namespace twinflow
