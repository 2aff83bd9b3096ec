// AVX-512: a tile of R rows x 32 columns keeps 2R accumulators in registers; an input costs two
// weight loads, R broadcasts and 2R fused multiply-adds.
#include "grouped_linear/grouped_linear.h"

#if defined(__x86_64__)
#include <immintrin.h>

#include <algorithm>

#define FASTREC_AVX512 __attribute__((target(FASTREC_TARGET_avx512)))
#define FASTREC_INLINE FASTREC_AVX512 inline __attribute__((always_inline))

namespace fastrec::grouped_linear {
namespace {

FASTREC_INLINE __mmask16 first_lanes(int64_t count) {
  return count >= kLine ? 0xffff : static_cast<__mmask16>((1u << count) - 1);
}

FASTREC_INLINE __m512 widen(__m256i bf16x16) {
  return _mm512_castsi512_ps(_mm512_slli_epi32(_mm512_cvtepu16_epi32(bf16x16), 16));
}

// To bf16, to nearest even; a NaN stays one.
FASTREC_INLINE __m256i narrow(__m512 value) {
  const __m512i bits = _mm512_castps_si512(value);
  const __m512i odd = _mm512_and_si512(_mm512_srli_epi32(bits, 16), _mm512_set1_epi32(1));
  __m512i rounded = _mm512_add_epi32(bits, _mm512_add_epi32(odd, _mm512_set1_epi32(0x7fff)));
  const __mmask16 nan = _mm512_cmp_ps_mask(value, value, _CMP_UNORD_Q);
  rounded = _mm512_mask_or_epi32(rounded, nan, bits, _mm512_set1_epi32(0x400000));
  return _mm512_cvtepi32_epi16(_mm512_srli_epi32(rounded, 16));
}

FASTREC_AVX512 void load(const void* from, Dtype dtype, int64_t row_stride, int64_t element,
                         int64_t depth, int rows, float* to, int64_t row_step, int64_t line_step) {
  if (element != 1) {
    kScalar.load(from, dtype, row_stride, element, depth, rows, to, row_step, line_step);
    return;
  }
  for (int r = 0; r < rows; ++r) {
    float* line = to + r * row_step;
    for (int64_t k = 0; k < depth; k += kLine, line += line_step) {
      const __mmask16 lanes = first_lanes(depth - k);
      const int64_t at = r * row_stride + k;
      _mm512_storeu_ps(
          line,
          dtype == Dtype::f32
              ? _mm512_maskz_loadu_ps(lanes, static_cast<const float*>(from) + at)
              : widen(_mm256_maskz_loadu_epi16(lanes, static_cast<const uint16_t*>(from) + at)));
    }
  }
}

// noinline and all loops over rows unrolled: gcc 12 spills the accumulators otherwise.
template <int R, int V>
FASTREC_AVX512 __attribute__((noinline)) void tile_product(const float* tile, const float* panel,
                                                           int64_t depth, const float* start,
                                                           float* c, int64_t c_row) {
  __m512 acc[R][V];
#pragma GCC unroll 16
  for (int r = 0; r < R; ++r)
#pragma GCC unroll 2
    for (int v = 0; v < V; ++v) acc[r][v] = _mm512_loadu_ps(start + v * kLine);

  for (; depth > 0; depth -= kLine, tile += (R - 1) * kLine) {
    const float* const end = tile + std::min<int64_t>(depth, kLine);
    do {
      __m512 weight[V];
#pragma GCC unroll 2
      for (int v = 0; v < V; ++v) weight[v] = _mm512_loadu_ps(panel + v * kLine);
#pragma GCC unroll 16
      for (int r = 0; r < R; ++r) {
        const __m512 x = _mm512_set1_ps(tile[r * kLine]);
#pragma GCC unroll 2
        for (int v = 0; v < V; ++v) acc[r][v] = _mm512_fmadd_ps(x, weight[v], acc[r][v]);
      }
      panel += kPanelColumns;
    } while (++tile != end);
  }
#pragma GCC unroll 16
  for (int r = 0; r < R; ++r)
#pragma GCC unroll 2
    for (int v = 0; v < V; ++v) _mm512_storeu_ps(c + r * c_row + v * kLine, acc[r][v]);
}

template <int R, int V>
FASTREC_AVX512 __attribute__((noinline)) void outer_product(const float* a, int64_t a_row,
                                                            const float* b, int64_t b_row,
                                                            int64_t depth, float* c,
                                                            int64_t c_row) {
  __m512 acc[R][V];
#pragma GCC unroll 16
  for (int r = 0; r < R; ++r)
#pragma GCC unroll 2
    for (int v = 0; v < V; ++v) acc[r][v] = _mm512_setzero_ps();

  for (; depth > 0; --depth, a += a_row, b += b_row) {
    __m512 column[V];
#pragma GCC unroll 2
    for (int v = 0; v < V; ++v) column[v] = _mm512_loadu_ps(b + v * kLine);
#pragma GCC unroll 16
    for (int r = 0; r < R; ++r) {
      const __m512 x = _mm512_set1_ps(a[r]);
#pragma GCC unroll 2
      for (int v = 0; v < V; ++v) acc[r][v] = _mm512_fmadd_ps(x, column[v], acc[r][v]);
    }
  }
#pragma GCC unroll 16
  for (int r = 0; r < R; ++r)
#pragma GCC unroll 2
    for (int v = 0; v < V; ++v) {
      float* const to = c + r * c_row + v * kLine;
      _mm512_storeu_ps(to, _mm512_add_ps(_mm512_loadu_ps(to), acc[r][v]));
    }
}

using TileProduct = void (*)(const float*, const float*, int64_t, const float*, float*, int64_t);
using OuterProduct = void (*)(const float*, int64_t, const float*, int64_t, int64_t, float*,
                              int64_t);
#define FASTREC_ROWS(F, V)                                 \
  {F<1, V>, F<2, V>, F<3, V>, F<4, V>,  F<5, V>,  F<6, V>, \
   F<7, V>, F<8, V>, F<9, V>, F<10, V>, F<11, V>, F<12, V>}
constexpr TileProduct kTileProduct[2][kTileRows] = {FASTREC_ROWS(tile_product, 1),
                                                    FASTREC_ROWS(tile_product, 2)};
constexpr OuterProduct kOuterProduct[2][kTileRows] = {FASTREC_ROWS(outer_product, 1),
                                                      FASTREC_ROWS(outer_product, 2)};

void multiply(const float* tile, const float* panel, int64_t depth, int rows, int halves,
              const float* start, float* c, int64_t c_row) {
  kTileProduct[halves - 1][rows - 1](tile, panel, depth, start, c, c_row);
}

void outer(const float* a, int64_t a_row, const float* b, int64_t b_row, int64_t depth, int rows,
           int halves, float* c, int64_t c_row) {
  kOuterProduct[halves - 1][rows - 1](a, a_row, b, b_row, depth, c, c_row);
}

// Masked stores are many times slower than plain ones on some CPUs (AMD Zen 4): only at the end.
FASTREC_AVX512 void store(const float* c, int64_t c_row, int rows, int count, void* to, Dtype dtype,
                          int64_t row_stride, int64_t element) {
  if (element != 1) {
    kScalar.store(c, c_row, rows, count, to, dtype, row_stride, element);
    return;
  }
  for (int r = 0; r < rows; ++r)
    for (int n = 0; n < count; n += kLine) {
      const __m512 value = _mm512_loadu_ps(c + r * c_row + n);
      const __mmask16 lanes = first_lanes(count - n);
      const int64_t at = r * row_stride + n;
      if (dtype == Dtype::f32) {
        float* const f32 = static_cast<float*>(to) + at;
        if (lanes == 0xffff)
          _mm512_storeu_ps(f32, value);
        else
          _mm512_mask_storeu_ps(f32, lanes, value);
      } else {
        uint16_t* const bf16 = static_cast<uint16_t*>(to) + at;
        if (lanes == 0xffff)
          _mm256_storeu_si256(reinterpret_cast<__m256i*>(bf16), narrow(value));
        else
          _mm256_mask_storeu_epi16(bf16, lanes, narrow(value));
      }
    }
}

}  // namespace

const Kernel kAvx512 = {Isa::avx512, 1, load, multiply, outer, store, dots_avx512, 8};

}  // namespace fastrec::grouped_linear
#endif
