// AVX-512 BF16: as avx512.cpp, on pairs of bf16: vdpbf16ps multiplies twice as many a cycle. It
// takes subnormal inputs as zeros and flushes subnormal sums.
#include "grouped_linear/grouped_linear.h"

#if defined(__x86_64__)
#include <immintrin.h>

#include <algorithm>
#include <cstring>

#define FASTREC_AVX512BF16 __attribute__((target(FASTREC_TARGET_avx512bf16)))

namespace fastrec::grouped_linear {
namespace {

constexpr int kPairLine = 2 * kLine;  // bf16 a line

// Rows of floats, rounded to nearest even.
FASTREC_AVX512BF16 void load_floats(const float* from, int64_t row_stride, int64_t depth, int rows,
                                    float* to, int64_t row_step, int64_t line_step) {
  for (int r = 0; r < rows; ++r) {
    const float* const row = from + r * row_stride;
    float* line = to + r * row_step;
    for (int64_t k = 0; k < depth; k += kPairLine, line += line_step) {
      const int64_t left = depth - k;
      const uint32_t lanes = left >= kPairLine ? ~0u : (1u << left) - 1;
      const __m512 low = _mm512_maskz_loadu_ps(static_cast<__mmask16>(lanes), row + k);
      const __m512 high =
          _mm512_maskz_loadu_ps(static_cast<__mmask16>(lanes >> kLine), row + k + kLine);
      _mm512_storeu_si512(line, (__m512i)_mm512_cvtne2ps_pbh(high, low));
    }
  }
}

// Floats lie next to each other: strided ones are loaded as bf16 alone.
FASTREC_AVX512BF16 void load(const void* from, Dtype dtype, int64_t row_stride, int64_t element,
                             int64_t depth, int rows, float* to, int64_t row_step,
                             int64_t line_step) {
  if (dtype == Dtype::f32) {
    load_floats(static_cast<const float*>(from), row_stride, depth, rows, to, row_step, line_step);
    return;
  }
  for (int r = 0; r < rows; ++r) {
    const uint16_t* const row = static_cast<const uint16_t*>(from) + r * row_stride;
    float* line = to + r * row_step;
    for (int64_t k = 0; k < depth; k += kPairLine, line += line_step) {
      const int64_t left = depth - k;
      if (element == 1) {
        const __mmask32 lanes = left >= kPairLine ? ~0u : (1u << left) - 1;
        _mm512_storeu_si512(line, _mm512_maskz_loadu_epi16(lanes, row + k));
        continue;
      }
      uint16_t line_bf16[kPairLine] = {};
      for (int64_t i = 0; i < std::min<int64_t>(left, kPairLine); ++i)
        line_bf16[i] = row[(k + i) * element];
      std::memcpy(line, line_bf16, sizeof(line_bf16));
    }
  }
}

// See avx512.cpp.
template <int R, int V>
FASTREC_AVX512BF16 __attribute__((noinline)) void pair_product(const float* tile,
                                                               const float* panel, int64_t depth,
                                                               const float* start, float* c,
                                                               int64_t c_row) {
  __m512 acc[R][V];
#pragma GCC unroll 16
  for (int r = 0; r < R; ++r)
#pragma GCC unroll 2
    for (int v = 0; v < V; ++v) acc[r][v] = _mm512_loadu_ps(start + v * kLine);

  for (; depth > 0; depth -= kLine, tile += (R - 1) * kLine) {
    const float* const end = tile + std::min<int64_t>(depth, kLine);
    do {
      __m512i weight[V];
#pragma GCC unroll 2
      for (int v = 0; v < V; ++v) weight[v] = _mm512_loadu_si512(panel + v * kLine);
#pragma GCC unroll 16
      for (int r = 0; r < R; ++r) {
        int32_t pair;
        std::memcpy(&pair, tile + r * kLine, sizeof(pair));
        const __m512i x = _mm512_set1_epi32(pair);
#pragma GCC unroll 2
        for (int v = 0; v < V; ++v)
          acc[r][v] = _mm512_dpbf16_ps(acc[r][v], (__m512bh)x, (__m512bh)weight[v]);
      }
      panel += kPanelColumns;
    } while (++tile != end);
  }
#pragma GCC unroll 16
  for (int r = 0; r < R; ++r)
#pragma GCC unroll 2
    for (int v = 0; v < V; ++v) _mm512_storeu_ps(c + r * c_row + v * kLine, acc[r][v]);
}

using PairProduct = void (*)(const float*, const float*, int64_t, const float*, float*, int64_t);
#define FASTREC_ROWS(V)                                                              \
  {pair_product<1, V>, pair_product<2, V>,  pair_product<3, V>,  pair_product<4, V>, \
   pair_product<5, V>, pair_product<6, V>,  pair_product<7, V>,  pair_product<8, V>, \
   pair_product<9, V>, pair_product<10, V>, pair_product<11, V>, pair_product<12, V>}
constexpr PairProduct kPairProduct[2][kTileRows] = {FASTREC_ROWS(1), FASTREC_ROWS(2)};

void multiply(const float* tile, const float* panel, int64_t depth, int rows, int halves,
              const float* start, float* c, int64_t c_row) {
  kPairProduct[halves - 1][rows - 1](tile, panel, depth, start, c, c_row);
}

void outer(const float* a, int64_t a_row, const float* b, int64_t b_row, int64_t depth, int rows,
           int halves, float* c, int64_t c_row) {
  kAvx512.outer(a, a_row, b, b_row, depth, rows, halves, c, c_row);
}

FASTREC_AVX512BF16 void store(const float* c, int64_t c_row, int rows, int count, void* to,
                              Dtype dtype, int64_t row_stride, int64_t element) {
  if (dtype != Dtype::bf16 || element != 1 || count % kLine) {
    kAvx512.store(c, c_row, rows, count, to, dtype, row_stride, element);
    return;
  }
  for (int r = 0; r < rows; ++r)
    for (int n = 0; n < count; n += kLine)
      _mm256_storeu_si256(
          reinterpret_cast<__m256i*>(static_cast<uint16_t*>(to) + r * row_stride + n),
          (__m256i)_mm512_cvtneps_pbh(_mm512_loadu_ps(c + r * c_row + n)));
}

}  // namespace

const Kernel kAvx512bf16 = {Isa::avx512bf16, 2, load, multiply, outer, store, dots_avx512, 2};

}  // namespace fastrec::grouped_linear
#endif
