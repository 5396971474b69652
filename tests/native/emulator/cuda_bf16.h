// bfloat16 as csrc/cuda needs it, for the emulator.
#pragma once

#include <cstdint>
#include <cstring>

struct __nv_bfloat16 {
  uint16_t bits;
};

inline float __bfloat162float(__nv_bfloat16 v) {
  const uint32_t wide = static_cast<uint32_t>(v.bits) << 16;
  float out;
  std::memcpy(&out, &wide, sizeof out);
  return out;
}

inline __nv_bfloat16 __float2bfloat16_rn(float v) {
  uint32_t wide;
  std::memcpy(&wide, &v, sizeof wide);
  if ((wide & 0x7fffffff) > 0x7f800000) return {0x7fff};
  return {static_cast<uint16_t>((wide + 0x7fff + ((wide >> 16) & 1)) >> 16)};
}
