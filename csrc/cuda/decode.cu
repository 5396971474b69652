// to_uint8: planar image in [-1, 1] to interleaved bytes.

#include "common.cuh"

namespace twinflow {
namespace {

constexpr int THREADS = 256;

__device__ inline uint8_t to_byte(float v) {
  v = fminf(fmaxf(v * 0.5f + 0.5f, 0.0f), 1.0f);  // fmaxf turns NaN into 0
  return static_cast<uint8_t>(__float2int_rn(v * 255.0f));
}

// One thread: one byte of the output.
template <class T>
__global__ void __launch_bounds__(THREADS)
    bytes(const T* image, twinflow_image at, uint8_t* out, int64_t count, int channels, int height, int width) {
  const int64_t i = blockIdx.x * static_cast<int64_t>(THREADS) + threadIdx.x;
  if (i >= count) return;
  const int64_t c = i % channels, x = i / channels % width;
  const int64_t y = i / channels / width % height, b = i / channels / width / height;
  out[i] = to_byte(load(image[b * at.batch + c * at.channels + y * at.height + x * at.width]));
}

// One thread: 16 bytes of each of three planes in, N whole RGB pixels (3 N bytes, as words) out.
template <class T>
__global__ void __launch_bounds__(THREADS)
    pixels(const T* image, twinflow_image at, uint8_t* out, int64_t count, int height, int width) {
  constexpr int N = WIDE<T>;
  const int64_t i = (blockIdx.x * static_cast<int64_t>(THREADS) + threadIdx.x) * N;
  if (i >= count) return;
  const int64_t x = i % width, y = i / width % height, b = i / width / height;
  alignas(4) uint8_t rgb[3 * N];
#pragma unroll
  for (int c = 0; c < 3; ++c) {
    const T* source = image + b * at.batch + c * at.channels + y * at.height + x;
    const auto group = *reinterpret_cast<const Group<T, N>*>(source);
#pragma unroll
    for (int j = 0; j < N; ++j) rgb[3 * j + c] = to_byte(load(group.v[j]));
  }
#pragma unroll
  for (int w = 0; w < 3 * N / 4; ++w)
    reinterpret_cast<uint32_t*>(out + 3 * i)[w] = reinterpret_cast<const uint32_t*>(rgb)[w];
}

template <class T>
bool whole_groups(const T* image, const twinflow_image& at, const uint8_t* out, int64_t channels, int64_t width) {
  constexpr int64_t N = WIDE<T>;
  return channels == 3 && at.width == 1 && width % N == 0 && at.height % N == 0 && at.channels % N == 0 &&
         at.batch % N == 0 && aligned16(image) && aligned16(out);
}

int64_t blocks(int64_t threads) { return (threads + THREADS - 1) / THREADS; }

}  // namespace

int launch_to_uint8(const void* image, twinflow_image strides, uint8_t* out, twinflow_image size, twinflow_launch how) {
  if (size.batch < 0 || size.channels < 1 || size.height < 0 || size.width < 0 || size.channels > INT32_MAX ||
      size.height > INT32_MAX || size.width > INT32_MAX)
    return TWINFLOW_BAD_SHAPE;
  const int64_t count = size.batch * size.height * size.width;
  if (count == 0) return TWINFLOW_OK;
  if (!(image && out)) return TWINFLOW_NULL_POINTER;
  return typed(how.dtype, [&](auto kind) {
    using T = decltype(kind);
    const T* from = static_cast<const T*>(image);
    const int height = static_cast<int>(size.height), width = static_cast<int>(size.width);
    if (whole_groups(from, strides, out, size.channels, size.width))
      return launch(pixels<T>, blocks(count / WIDE<T>), THREADS, how.stream, from, strides, out, count, height, width);
    return launch(bytes<T>, blocks(count * size.channels), THREADS, how.stream, from, strides, out,
                  count * size.channels, static_cast<int>(size.channels), height, width);
  });
}

}  // namespace twinflow
