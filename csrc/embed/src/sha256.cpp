#include "sha256.h"

#include <array>
#include <cmath>
#include <cstdint>
#include <cstring>

namespace twinflow {

namespace {

using State = std::array<uint32_t, 8>;
constexpr size_t kBlock = 64;

// The first 32 bits of the fractional part of a prime's square or cube root, which the constants are.
uint32_t fraction(long double root) { return static_cast<uint32_t>((root - std::floor(root)) * 4294967296.0L); }

struct Constants {
  State start{};
  std::array<uint32_t, 64> rounds{};

  Constants() {
    size_t found = 0;
    for (uint32_t n = 2; found < rounds.size(); ++n) {
      bool prime = true;
      for (uint32_t d = 2; d * d <= n; ++d) prime = prime && n % d != 0;
      if (!prime) continue;
      if (found < start.size()) start[found] = fraction(std::sqrt(static_cast<long double>(n)));
      rounds[found++] = fraction(std::cbrt(static_cast<long double>(n)));
    }
  }
};

const Constants& constants() {
  static const Constants made;
  return made;
}

uint32_t rotated(uint32_t x, int by) { return x >> by | x << (32 - by); }

void absorb(State& state, const uint8_t* block) {
  std::array<uint32_t, 64> w{};
  for (size_t i = 0; i < 16; ++i)
    for (size_t k = 0; k < 4; ++k) w[i] = w[i] << 8 | block[4 * i + k];
  for (size_t i = 16; i < w.size(); ++i) {
    const uint32_t a = w[i - 15], b = w[i - 2];
    w[i] =
        w[i - 16] + w[i - 7] + (rotated(a, 7) ^ rotated(a, 18) ^ a >> 3) + (rotated(b, 17) ^ rotated(b, 19) ^ b >> 10);
  }
  auto [a, b, c, d, e, f, g, h] = state;
  for (size_t i = 0; i < w.size(); ++i) {
    const uint32_t first =
        h + (rotated(e, 6) ^ rotated(e, 11) ^ rotated(e, 25)) + ((e & f) ^ (~e & g)) + constants().rounds[i] + w[i];
    const uint32_t second = (rotated(a, 2) ^ rotated(a, 13) ^ rotated(a, 22)) + ((a & b) ^ (a & c) ^ (b & c));
    h = g, g = f, f = e, e = d + first, d = c, c = b, b = a, a = first + second;
  }
  const State add = {a, b, c, d, e, f, g, h};
  for (size_t i = 0; i < add.size(); ++i) state[i] += add[i];
}

}  // namespace

std::string sha256(const void* data, size_t size) {
  const uint8_t* bytes = static_cast<const uint8_t*>(data);
  State state = constants().start;
  const size_t whole = size / kBlock * kBlock, rest = size - whole;
  for (size_t at = 0; at < whole; at += kBlock) absorb(state, bytes + at);
  std::array<uint8_t, 2 * kBlock> tail{};  // what is left, a one bit, zeros, the number of bits
  if (rest > 0) std::memcpy(tail.data(), bytes + whole, rest);
  tail[rest] = 0x80;
  const size_t end = rest + 9 > kBlock ? 2 * kBlock : kBlock;
  for (size_t i = 0; i < 8; ++i) tail[end - 1 - i] = static_cast<uint8_t>(uint64_t{size} * 8 >> (8 * i));
  for (size_t at = 0; at < end; at += kBlock) absorb(state, tail.data() + at);
  std::string out;
  for (const uint32_t word : state)
    for (int shift = 28; shift >= 0; shift -= 4) out += "0123456789abcdef"[word >> shift & 15];
  return out;
}

}  // namespace twinflow
