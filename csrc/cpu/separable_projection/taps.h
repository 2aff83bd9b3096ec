// Sixteen channels at a time; included by one file per instruction set, after its vec16 header.
// kBlock rows or taps keep their sums in registers. noinline and all loops over them unrolled: gcc
// 12 spills the sums otherwise.
#pragma once

#include <algorithm>
#include <array>
#include <utility>

#include "separable_projection/separable_projection.h"

// Rows overlap from one step to the next: gcc would keep them, and spill the sums instead.
#define FASTREC_OPAQUE(pointer) __asm__("" : "+r"(pointer))

namespace fastrec::separable_projection {
namespace {

template <int R>
FASTREC_VEC __attribute__((noinline)) void convolve_block(const float* x, const float* taps,
                                                          int width, float* out) {
  Floats sum[R];
#pragma GCC unroll 16
  for (int r = 0; r < R; ++r) sum[r] = zeros();
  for (int j = 0; j < width; ++j, x += kLine, taps += kLine) {
    FASTREC_OPAQUE(x);
    const Floats tap = load(taps);
#pragma GCC unroll 16
    for (int r = 0; r < R; ++r) sum[r] = fma(tap, load(x + r * kLine), sum[r]);
  }
#pragma GCC unroll 16
  for (int r = 0; r < R; ++r) store(out + r * kLine, sum[r]);
}

template <int T>
FASTREC_VEC __attribute__((noinline)) void correlate_block(const float* gradient, const float* x,
                                                           int64_t rows, float* taps) {
  Floats sum[T];
#pragma GCC unroll 16
  for (int t = 0; t < T; ++t) sum[t] = zeros();
  for (int64_t r = 0; r < rows; ++r, gradient += kLine, x += kLine) {
    FASTREC_OPAQUE(x);
    const Floats dh = load(gradient);
#pragma GCC unroll 16
    for (int t = 0; t < T; ++t) sum[t] = fma(dh, load(x + t * kLine), sum[t]);
  }
#pragma GCC unroll 16
  for (int t = 0; t < T; ++t) store(taps + t * kLine, add(load(taps + t * kLine), sum[t]));
}

using ConvolveBlock = void (*)(const float*, const float*, int, float*);
using CorrelateBlock = void (*)(const float*, const float*, int64_t, float*);

template <int... i>
constexpr std::array<ConvolveBlock, kBlock> convolve_blocks(std::integer_sequence<int, i...>) {
  return {convolve_block<i + 1>...};
}
template <int... i>
constexpr std::array<CorrelateBlock, kBlock> correlate_blocks(std::integer_sequence<int, i...>) {
  return {correlate_block<i + 1>...};
}
constexpr auto kConvolve = convolve_blocks(std::make_integer_sequence<int, kBlock>());
constexpr auto kCorrelate = correlate_blocks(std::make_integer_sequence<int, kBlock>());

void convolve_rows(const float* x, const float* taps, int width, int rows, float* out) {
  for (int r = 0; r < rows; r += kBlock)
    kConvolve[std::min(kBlock, rows - r) - 1](x + r * kLine, taps, width, out + r * kLine);
}

void correlate(const float* gradient, const float* x, int width, int64_t rows, float* taps) {
  for (int j = 0; j < width; j += kBlock)
    kCorrelate[std::min(kBlock, width - j) - 1](gradient, x + j * kLine, rows, taps + j * kLine);
}

}  // namespace
}  // namespace fastrec::separable_projection
