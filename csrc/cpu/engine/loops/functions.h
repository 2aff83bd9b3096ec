// Functions of one element in IEEE operations alone: no contraction, no branch, so that loops over
// them become vector code and every instruction set gives the same bits. Least squares with
// iterative reweighting towards the minimax; the errors stand in loops.h.
#pragma once

#include <bit>
#include <cmath>
#include <cstdint>

// A call would keep the loop around it from becoming vector code.
#define FASTREC_ELEMENT __attribute__((always_inline)) inline

namespace fastrec::engine::loops {
namespace {

// Added and taken away again, it rounds to an integer, half to even.
constexpr float kRound = 12582912.0f;  // 1.5 * 2^23
constexpr uint32_t kRoundBits = 0x4b400000;

FASTREC_ELEMENT float round_even(float x) { return (x + kRound) - kRound; }

// `yes` where the condition holds: both are computed.
FASTREC_ELEMENT float select(bool condition, float yes, float no) {
  const uint32_t mask = 0u - static_cast<uint32_t>(condition);
  return std::bit_cast<float>((mask & std::bit_cast<uint32_t>(yes)) |
                              (~mask & std::bit_cast<uint32_t>(no)));
}

// 2^n for an integer -126 <= n <= 127.
FASTREC_ELEMENT float power_of_two(float n) {
  const uint32_t biased = std::bit_cast<uint32_t>(n + kRound) - kRoundBits + 127;
  return std::bit_cast<float>(biased << 23);
}

// e^x = 2^n * e^r, |r| <= ln(2) / 2.
struct Parts {
  float n, power;  // power: e^r
};
FASTREC_ELEMENT Parts exp_parts(float x) {
  const float n = round_even(x * 1.44269504088896341f);
  // ln(2) in two parts: the product with the first is exact.
  float r = x - n * 0.693359375f;
  r = r - n * -2.12194440e-4f;
  float p = 0.0013950601f;
  p = p * r + 0.008368954f;
  p = p * r + 0.041666206f;
  p = p * r + 0.16666518f;
  p = p * r + 0.5f;
  return {n, (p * r * r + r) + 1.0f};
}

// 2^n in two factors, so that neither leaves the normal numbers. Below -87 it is 0: results that
// are no normal numbers take a CPU a hundred cycles a register, and masked scores would have them.
FASTREC_ELEMENT float exp(float x) {
  float y = select(x < -87.0f, -87.0f, x);
  y = select(y > 89.0f, 89.0f, y);
  const Parts of = exp_parts(y);
  const float half = round_even(of.n * 0.5f);
  return select(x < -87.0f, 0.0f, of.power * power_of_two(half) * power_of_two(of.n - half));
}

// For |x| <= 87.
FASTREC_ELEMENT float exp_within(float x) {
  const Parts of = exp_parts(x);
  return of.power * power_of_two(of.n);
}

// 1 / x for 1 <= x <= 2^126: Newton's steps, which take less than a division.
FASTREC_ELEMENT float reciprocal(float x) {
  float y = std::bit_cast<float>(0x7ef311c7u - std::bit_cast<uint32_t>(x));
  y = y * (2.0f - x * y);
  y = y * (2.0f - x * y);
  return y + y * (1.0f - x * y);
}

// Below -87 it is 0.
FASTREC_ELEMENT float sigmoid(float x) {
  float y = select(x < -87.0f, -87.0f, x);
  y = select(y > 87.0f, 87.0f, y);
  return select(x < -87.0f, 0.0f, reciprocal(1.0f + exp_within(-y)));
}
// As x / (1 + e^-x) where that is infinite over infinite.
FASTREC_ELEMENT float silu(float x) { return x * sigmoid(x); }

// A polynomial below 0.625, beyond it 1 - 2 / (e^2x + 1).
FASTREC_ELEMENT float tanh(float x) {
  const float a = std::fabs(x), z = a * a;
  float p = -0.0057170326f;
  p = p * z + 0.020650575f;
  p = p * z + -0.053743493f;
  p = p * z + 0.13331491f;
  p = p * z + -0.33333284f;
  const float near = p * z * x + x;
  const float twice = select(a > 20.0f, 40.0f, a + a);
  const float far = std::copysign(1.0f - 2.0f * reciprocal(exp_within(twice) + 1.0f), x);
  return select(a < 0.625f, near, far);
}

// A polynomial below 1, beyond it 1 - e^-x^2 * (a polynomial of 1 / (1 + x / 2)).
FASTREC_ELEMENT float erf(float x) {
  const float a = std::fabs(x), z = a * a;
  float p = 7.853858e-05f;
  p = p * z + -0.0008010193f;
  p = p * z + 0.0051883277f;
  p = p * z + -0.026853813f;
  p = p * z + 0.112835854f;
  p = p * z + -0.37612626f;
  p = p * z + 1.1283791f;
  const float near = p * x;
  const float b = select(a > 4.2f, 4.2f, a);
  const float t = 1.0f / (1.0f + 0.5f * b);
  float q = 0.006652583f;
  q = q * t + -0.2540872f;
  q = q * t + 0.6705471f;
  q = q * t + -0.09065675f;
  q = q * t + 0.40816647f;
  q = q * t + 0.25707918f;
  q = q * t + 0.0020736505f;
  const float far = std::copysign(1.0f - exp(-(b * b)) * q, x);
  return select(a < 1.0f, near, far);
}

}  // namespace
}  // namespace fastrec::engine::loops
