// AVX2: a tile is multiplied in blocks of at most 6 rows x 16 columns, 12 accumulators of 8 lanes.
#include "grouped_linear/grouped_linear.h"

#if defined(__x86_64__)
#include <immintrin.h>

#include <algorithm>

#define FASTREC_AVX2 __attribute__((target(FASTREC_TARGET_avx2)))

namespace fastrec::grouped_linear {
namespace {

constexpr int kLanes = 8;
constexpr int kBlockRows = 6;
constexpr int kVectors = 2;  // of 8 columns: half a panel

FASTREC_AVX2 void load(const void* from, Dtype dtype, int64_t row_stride, int64_t element,
                       int64_t depth, int rows, float* to, int64_t row_step, int64_t line_step) {
  const int64_t whole = element == 1 ? depth / kLine * kLine : 0;
  for (int r = 0; r < rows; ++r) {
    float* line = to + r * row_step;
    for (int64_t k = 0; k < whole; k += kLine, line += line_step)
      for (int v = 0; v < kLine; v += kLanes) {
        const int64_t at = r * row_stride + k + v;
        if (dtype == Dtype::f32) {
          _mm256_storeu_ps(line + v, _mm256_loadu_ps(static_cast<const float*>(from) + at));
          continue;
        }
        const __m128i bits = _mm_loadu_si128(
            reinterpret_cast<const __m128i*>(static_cast<const uint16_t*>(from) + at));
        _mm256_storeu_ps(line + v,
                         _mm256_castsi256_ps(_mm256_slli_epi32(_mm256_cvtepu16_epi32(bits), 16)));
      }
  }
  if (whole == depth) return;
  const char* const rest = static_cast<const char*>(from) + whole * (dtype == Dtype::f32 ? 4 : 2);
  kScalar.load(rest, dtype, row_stride, element, depth - whole, rows,
               to + whole / kLine * line_step, row_step, line_step);
}

// noinline and all loops over rows unrolled: gcc 12 spills the accumulators otherwise.
template <int R>
FASTREC_AVX2 __attribute__((noinline)) void tile_product(const float* tile, int64_t next_line,
                                                         const float* panel, int64_t depth,
                                                         const float* start, float* c,
                                                         int64_t c_row) {
  __m256 acc[R][kVectors];
#pragma GCC unroll 8
  for (int r = 0; r < R; ++r)
#pragma GCC unroll 2
    for (int v = 0; v < kVectors; ++v) acc[r][v] = _mm256_loadu_ps(start + v * kLanes);

  for (; depth > 0; depth -= kLine, tile += next_line) {
    const float* const end = tile + std::min<int64_t>(depth, kLine);
    do {
      const __m256 low = _mm256_loadu_ps(panel), high = _mm256_loadu_ps(panel + kLanes);
#pragma GCC unroll 8
      for (int r = 0; r < R; ++r) {
        const __m256 x = _mm256_set1_ps(tile[r * kLine]);
        acc[r][0] = _mm256_fmadd_ps(x, low, acc[r][0]);
        acc[r][1] = _mm256_fmadd_ps(x, high, acc[r][1]);
      }
      panel += kPanelColumns;
    } while (++tile != end);
  }
#pragma GCC unroll 8
  for (int r = 0; r < R; ++r)
#pragma GCC unroll 2
    for (int v = 0; v < kVectors; ++v) _mm256_storeu_ps(c + r * c_row + v * kLanes, acc[r][v]);
}

template <int R>
FASTREC_AVX2 __attribute__((noinline)) void outer_product(const float* a, int64_t a_row,
                                                          const float* b, int64_t b_row,
                                                          int64_t depth, float* c, int64_t c_row) {
  __m256 acc[R][kVectors];
#pragma GCC unroll 8
  for (int r = 0; r < R; ++r) acc[r][0] = acc[r][1] = _mm256_setzero_ps();

  for (; depth > 0; --depth, a += a_row, b += b_row) {
    const __m256 low = _mm256_loadu_ps(b), high = _mm256_loadu_ps(b + kLanes);
#pragma GCC unroll 8
    for (int r = 0; r < R; ++r) {
      const __m256 x = _mm256_set1_ps(a[r]);
      acc[r][0] = _mm256_fmadd_ps(x, low, acc[r][0]);
      acc[r][1] = _mm256_fmadd_ps(x, high, acc[r][1]);
    }
  }
#pragma GCC unroll 8
  for (int r = 0; r < R; ++r)
#pragma GCC unroll 2
    for (int v = 0; v < kVectors; ++v) {
      float* const to = c + r * c_row + v * kLanes;
      _mm256_storeu_ps(to, _mm256_add_ps(_mm256_loadu_ps(to), acc[r][v]));
    }
}

using TileProduct = void (*)(const float*, int64_t, const float*, int64_t, const float*, float*,
                             int64_t);
using OuterProduct = void (*)(const float*, int64_t, const float*, int64_t, int64_t, float*,
                              int64_t);
constexpr TileProduct kTileProduct[kBlockRows] = {tile_product<1>, tile_product<2>,
                                                  tile_product<3>, tile_product<4>,
                                                  tile_product<5>, tile_product<6>};
constexpr OuterProduct kOuterProduct[kBlockRows] = {outer_product<1>, outer_product<2>,
                                                    outer_product<3>, outer_product<4>,
                                                    outer_product<5>, outer_product<6>};

// More than 6 rows are two blocks of nearly the same height.
int block_rows(int rows) { return rows > kBlockRows ? (rows + 1) / 2 : rows; }

void multiply(const float* tile, const float* panel, int64_t depth, int rows, int halves,
              const float* start, float* c, int64_t c_row) {
  const int64_t next_line = (rows - 1) * kLine;
  const int step = block_rows(rows);
  for (int n = 0; n < halves * kLine; n += kLine)
    for (int r = 0; r < rows; r += step)
      kTileProduct[std::min(step, rows - r) - 1](tile + r * kLine, next_line, panel + n, depth,
                                                 start + n, c + r * c_row + n, c_row);
}

void outer(const float* a, int64_t a_row, const float* b, int64_t b_row, int64_t depth, int rows,
           int halves, float* c, int64_t c_row) {
  const int step = block_rows(rows);
  for (int n = 0; n < halves * kLine; n += kLine)
    for (int r = 0; r < rows; r += step)
      kOuterProduct[std::min(step, rows - r) - 1](a + r, a_row, b + n, b_row, depth,
                                                  c + r * c_row + n, c_row);
}

FASTREC_AVX2 void store(const float* c, int64_t c_row, int rows, int count, void* to, Dtype dtype,
                        int64_t row_stride, int64_t element) {
  if (dtype != Dtype::bf16 || element != 1 || count % kLanes) {
    kScalar.store(c, c_row, rows, count, to, dtype, row_stride, element);
    return;
  }
  for (int r = 0; r < rows; ++r)
    for (int n = 0; n < count; n += kLanes) {
      const __m256 value = _mm256_loadu_ps(c + r * c_row + n);
      const __m256i bits = _mm256_castps_si256(value);
      const __m256i odd = _mm256_and_si256(_mm256_srli_epi32(bits, 16), _mm256_set1_epi32(1));
      const __m256i rounded =
          _mm256_add_epi32(bits, _mm256_add_epi32(odd, _mm256_set1_epi32(0x7fff)));
      const __m256i quiet = _mm256_or_si256(bits, _mm256_set1_epi32(0x400000));
      const __m256i nan = _mm256_castps_si256(_mm256_cmp_ps(value, value, _CMP_UNORD_Q));
      const __m256i upper = _mm256_srli_epi32(_mm256_blendv_epi8(rounded, quiet, nan), 16);
      const __m256i packed = _mm256_permute4x64_epi64(_mm256_packus_epi32(upper, upper), 0x08);
      _mm_storeu_si128(reinterpret_cast<__m128i*>(static_cast<uint16_t*>(to) + r * row_stride + n),
                       _mm256_castsi256_si128(packed));
    }
}

}  // namespace

const Kernel kAvx2 = {Isa::avx2, 1, load, multiply, outer, store, dots_avx2, 6};

}  // namespace fastrec::grouped_linear
#endif
