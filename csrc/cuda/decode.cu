// to_uint8: planar image in [-1, 1] to interleaved bytes.

#include "common.cuh"

namespace twinflow {
namespace {

constexpr int THREADS = 256;

__device__ inline uint8_t to_byte(float v) {
  v = fminf(fmaxf(v * 0.5f + 0.5f, 0.0f), 1.0f);  // fmaxf turns NaN into 0
  return static_cast<uint8_t>(__float2int_rn(v * 255.0f));
}

struct Strides {
  int64_t batch, channel, row, column;
};

// One thread: one byte of the output.
template <class T>
__global__ void __launch_bounds__(THREADS)
    bytes(const T* image, Strides at, uint8_t* out, int64_t count, int channels, int height, int width) {
  const int64_t i = blockIdx.x * static_cast<int64_t>(THREADS) + threadIdx.x;
  if (i >= count) return;
  const int64_t c = i % channels, x = i / channels % width;
  const int64_t y = i / channels / width % height, b = i / channels / width / height;
  out[i] = to_byte(load(image[b * at.batch + c * at.channel + y * at.row + x * at.column]));
}

// One thread: 16 bytes of each of three planes in, N whole RGB pixels (3 N bytes, as words) out.
template <class T>
__global__ void __launch_bounds__(THREADS)
    pixels(const T* image, Strides at, uint8_t* out, int64_t count, int height, int width) {
  constexpr int N = WIDE<T>;
  const int64_t i = (blockIdx.x * static_cast<int64_t>(THREADS) + threadIdx.x) * N;
  if (i >= count) return;
  const int64_t x = i % width, y = i / width % height, b = i / width / height;
  alignas(4) uint8_t rgb[3 * N];
#pragma unroll
  for (int c = 0; c < 3; ++c) {
    const T* source = image + b * at.batch + c * at.channel + y * at.row + x;
    const auto group = *reinterpret_cast<const Group<T, N>*>(source);
#pragma unroll
    for (int j = 0; j < N; ++j) rgb[3 * j + c] = to_byte(load(group.v[j]));
  }
#pragma unroll
  for (int w = 0; w < 3 * N / 4; ++w)
    reinterpret_cast<uint32_t*>(out + 3 * i)[w] = reinterpret_cast<const uint32_t*>(rgb)[w];
}

template <class T>
bool whole_groups(const T* image, const Strides& at, const uint8_t* out, int64_t channels, int64_t width) {
  constexpr int64_t N = WIDE<T>;
  return channels == 3 && at.column == 1 && width % N == 0 && at.row % N == 0 && at.channel % N == 0 &&
         at.batch % N == 0 && aligned16(image) && aligned16(out);
}

int64_t blocks(int64_t threads) { return (threads + THREADS - 1) / THREADS; }

}  // namespace
}  // namespace twinflow

using namespace twinflow;

int twinflow_cuda_to_uint8(const void* image, const int64_t strides[4], uint8_t* out, int64_t batch, int64_t channels,
                           int64_t height, int64_t width, int dtype, void* stream) {
  if (batch < 0 || channels < 1 || height < 0 || width < 0 || channels > INT32_MAX || height > INT32_MAX ||
      width > INT32_MAX)
    return TWINFLOW_BAD_SHAPE;
  const int64_t count = batch * height * width;
  if (count == 0) return TWINFLOW_OK;
  if (!(image && strides && out)) return TWINFLOW_NULL_POINTER;
  const Strides at{strides[0], strides[1], strides[2], strides[3]};
  return typed(dtype, [&](auto kind) {
    using T = decltype(kind);
    const T* source = static_cast<const T*>(image);
    const int rows = static_cast<int>(height), columns = static_cast<int>(width);
    if (whole_groups(source, at, out, channels, width))
      return launch(pixels<T>, blocks(count / WIDE<T>), THREADS, stream, source, at, out, count, rows, columns);
    return launch(bytes<T>, blocks(count * channels), THREADS, stream, source, at, out, count * channels,
                  static_cast<int>(channels), rows, columns);
  });
}
