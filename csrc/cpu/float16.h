// The two 16-bit float formats as storage types, with conversions that any machine can run.
#pragma once

#include <bit>
#include <cmath>
#include <cstdint>

namespace fastrec {

struct Bf16 {
  uint16_t bits;
};
struct F16 {
  uint16_t bits;
};

inline float to_float(float x) { return x; }

inline float to_float(Bf16 x) { return std::bit_cast<float>(static_cast<uint32_t>(x.bits) << 16); }

inline float to_float(F16 x) {
  const uint32_t sign = static_cast<uint32_t>(x.bits & 0x8000) << 16;
  const uint32_t exponent = (x.bits >> 10) & 31, mantissa = x.bits & 0x3ff;
  if (exponent == 31) return std::bit_cast<float>(sign | 0x7f800000u | mantissa << 13);
  if (exponent == 0) {
    const float magnitude = static_cast<float>(mantissa) * 0x1p-24f;
    return sign ? -magnitude : magnitude;
  }
  return std::bit_cast<float>(sign | (exponent + 112) << 23 | mantissa << 13);
}

inline void from_float(float x, float& out) { out = x; }

// Round to nearest, ties to even; a NaN stays one.
inline void from_float(float x, Bf16& out) {
  const uint32_t bits = std::bit_cast<uint32_t>(x);
  out.bits = x != x ? 0x7fc0 : static_cast<uint16_t>((bits + 0x7fff + ((bits >> 16) & 1)) >> 16);
}

inline void from_float(float x, F16& out) {
  const uint32_t bits = std::bit_cast<uint32_t>(x);
  const uint16_t sign = static_cast<uint16_t>((bits >> 16) & 0x8000);
  const uint32_t magnitude = bits & 0x7fffffff;
  uint32_t half;
  if (magnitude > 0x7f800000)
    half = 0x7e00;
  else if (magnitude >= 0x477ff000)  // rounds to 2^16 or more
    half = 0x7c00;
  else if (magnitude < 0x38800000)  // below 2^-14: a multiple of 2^-24
    half = static_cast<uint32_t>(std::nearbyint(std::bit_cast<float>(magnitude) * 0x1p24f));
  else
    half = (magnitude + 0xfff + ((magnitude >> 13) & 1) - (112u << 23)) >> 13;
  out.bits = static_cast<uint16_t>(sign | half);
}

}  // namespace fastrec
