// float8 e4m3 as csrc/cuda needs it, for the emulator: the code of a number is searched among the values of all.
#pragma once

#include <cmath>

enum __nv_saturation_t { __NV_NOSAT, __NV_SATFINITE };
enum __nv_fp8_interpretation_t { __NV_E4M3, __NV_E5M2 };
using __nv_fp8_storage_t = unsigned char;

namespace emulator {

// Codes 0..126 are the magnitudes 0..448, in order.
inline float e4m3(int code) {
  const int exponent = code >> 3, fraction = code & 7;
  return exponent ? std::ldexp(8.0f + fraction, exponent - 10) : std::ldexp(static_cast<float>(fraction), -9);
}

}  // namespace emulator

// To nearest, half to the even code; beyond 448 saturates; NaN stays.
inline __nv_fp8_storage_t __nv_cvt_float_to_fp8(float v, __nv_saturation_t, __nv_fp8_interpretation_t) {
  const int sign = std::signbit(v) ? 0x80 : 0;
  const float size = std::fabs(v);
  if (std::isnan(v)) return static_cast<__nv_fp8_storage_t>(sign | 0x7f);
  int low = 0, high = 126;
  while (low < high) {  // the largest code whose value is not above
    const int middle = (low + high + 1) / 2;
    if (emulator::e4m3(middle) <= size)
      low = middle;
    else
      high = middle - 1;
  }
  if (low < 126) {
    const float below = size - emulator::e4m3(low), above = emulator::e4m3(low + 1) - size;
    if (above < below || (above == below && low % 2)) ++low;
  }
  return static_cast<__nv_fp8_storage_t>(sign | low);
}
