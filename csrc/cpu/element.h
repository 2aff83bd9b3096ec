// One element at a time, for the scalar twins: the exact steps of vec16_math.h.
#pragma once

#include <algorithm>
#include <bit>
#include <cmath>
#include <cstdint>

#include "gelu.h"
#include "quantisation.h"

namespace fastrec {

// The caller has seen to it that the value is no NaN.
inline uint8_t quantise(float value, Quantisation to) {
  const float low = static_cast<float>(-to.zero_point);
  const float high = static_cast<float>(255 - to.zero_point);
  const float clamped = std::min(std::max(value * (1.0f / to.scale), low), high);
  // nearbyint: round half to even in the default rounding mode, like cvtps2dq and torch.round.
  return static_cast<uint8_t>(static_cast<int32_t>(std::nearbyintf(clamped)) + to.zero_point);
}

inline float gelu(float value) {
  const float s = std::min(kErfLast, std::fabs(value) * kErfPieces), n = std::nearbyintf(s);
  const float t = s - n, half = 0.5f * value;
  const int piece = static_cast<int>(n);
  float erf = kErf[kErfDegree][piece];
  for (int i = kErfDegree - 1; i >= 0; --i) erf = std::fmaf(erf, t, kErf[i][piece]);
  return std::fmaf(std::fabs(half), erf, half);
}

inline float from_bf16(uint16_t bits) {
  return std::bit_cast<float>(static_cast<uint32_t>(bits) << 16);
}

// Rounded half to even, a NaN stays a (quiet) NaN.
inline uint16_t to_bf16(float value) {
  const uint32_t bits = std::bit_cast<uint32_t>(value);
  const uint32_t rounded = std::isnan(value) ? bits | 0x400000 : bits + 0x7fff + (bits >> 16 & 1);
  return static_cast<uint16_t>(rounded >> 16);
}

}  // namespace fastrec
