// Sixteen lanes as one zmm register: the names that kernels shared between instruction sets use.
//
// One ISA file includes either this or vec16_avx2.h, then the body of its op. Everything sits in an
// anonymous namespace and carries the target, so that no ISA's code can be linked into another's.
// Both headers round alike and add lanes in one order (i + (i + 8), then 4, 2, 1): results agree to
// the last bit.
#pragma once

#include <immintrin.h>

#include <cstdint>
#include <cstring>

#include "isa.h"

#define FASTREC_VEC __attribute__((target(FASTREC_TARGET_avx512)))
#define FASTREC_VEC_INLINE FASTREC_VEC inline __attribute__((always_inline))

namespace fastrec {
namespace {

constexpr int kLanes = 16;

using Floats = __m512;
using Ints = __m512i;
using Lanes = __mmask16;

FASTREC_VEC_INLINE Lanes first_lanes(int64_t count) {
  if (count <= 0) return 0;
  return count >= kLanes ? 0xffff : static_cast<Lanes>((1u << count) - 1);
}
FASTREC_VEC_INLINE bool all(Lanes lanes) { return lanes == 0xffff; }

FASTREC_VEC_INLINE Floats zeros() { return _mm512_setzero_ps(); }
FASTREC_VEC_INLINE Floats splat(float x) { return _mm512_set1_ps(x); }
FASTREC_VEC_INLINE Floats load(const float* from) { return _mm512_loadu_ps(from); }
// Zeros beyond the lanes, which are not read.
FASTREC_VEC_INLINE Floats load(const float* from, Lanes lanes) {
  return _mm512_maskz_loadu_ps(lanes, from);
}
FASTREC_VEC_INLINE void store(float* to, Floats x) { _mm512_storeu_ps(to, x); }
// Masked stores are many times slower than plain ones on some CPUs (AMD Zen 4).
FASTREC_VEC_INLINE void store(float* to, Floats x, Lanes lanes) {
  if (all(lanes))
    _mm512_storeu_ps(to, x);
  else
    _mm512_mask_storeu_ps(to, lanes, x);
}

FASTREC_VEC_INLINE Floats add(Floats a, Floats b) { return _mm512_add_ps(a, b); }
FASTREC_VEC_INLINE Floats subtract(Floats a, Floats b) { return _mm512_sub_ps(a, b); }
FASTREC_VEC_INLINE Floats multiply(Floats a, Floats b) { return _mm512_mul_ps(a, b); }
FASTREC_VEC_INLINE Floats divide(Floats a, Floats b) { return _mm512_div_ps(a, b); }
// a * b + c and c - a * b, rounded once.
FASTREC_VEC_INLINE Floats fma(Floats a, Floats b, Floats c) { return _mm512_fmadd_ps(a, b, c); }
FASTREC_VEC_INLINE Floats fnma(Floats a, Floats b, Floats c) { return _mm512_fnmadd_ps(a, b, c); }
FASTREC_VEC_INLINE Floats absolute(Floats x) { return _mm512_abs_ps(x); }
// sixteen[the lowest 4 bits of a lane], from a cache line.
FASTREC_VEC_INLINE Floats pick(const float* sixteen, Floats number) {
  return _mm512_permutexvar_ps(_mm512_castps_si512(number), _mm512_load_ps(sixteen));
}
// The second operand where either is a NaN.
FASTREC_VEC_INLINE Floats maximum(Floats a, Floats b) { return _mm512_max_ps(a, b); }
FASTREC_VEC_INLINE Floats minimum(Floats a, Floats b) { return _mm512_min_ps(a, b); }
FASTREC_VEC_INLINE Floats round_half_even(Floats x) {
  return _mm512_roundscale_ps(x, _MM_FROUND_TO_NEAREST_INT | _MM_FROUND_NO_EXC);
}
FASTREC_VEC_INLINE Floats blend(Lanes lanes, Floats inside, Floats outside) {
  return _mm512_mask_blend_ps(lanes, outside, inside);
}
// x * 2^n for integers n <= 0; 0 below n = -126: results that are no normal numbers take the CPU a
// hundred cycles a register, and keys that a mask hides have them.
FASTREC_VEC_INLINE Floats scale_by_power(Floats x, Floats n) {
  const __mmask16 normal = _mm512_cmp_ps_mask(n, _mm512_set1_ps(-126.0f), _CMP_NLT_UQ);
  return _mm512_maskz_scalef_ps(normal, x, n);
}

FASTREC_VEC_INLINE float sum_lanes(Floats x) {
  const __m256 eight = _mm256_add_ps(_mm512_castps512_ps256(x), _mm512_extractf32x8_ps(x, 1));
  const __m128 four = _mm_add_ps(_mm256_castps256_ps128(eight), _mm256_extractf128_ps(eight, 1));
  const __m128 two = _mm_add_ps(four, _mm_movehl_ps(four, four));
  return _mm_cvtss_f32(_mm_add_ss(two, _mm_movehdup_ps(two)));
}
FASTREC_VEC_INLINE float max_lanes(Floats x) { return _mm512_reduce_max_ps(x); }
FASTREC_VEC_INLINE bool any_nan(Floats x) { return _mm512_cmp_ps_mask(x, x, _CMP_UNORD_Q) != 0; }

FASTREC_VEC_INLINE Ints splat_int(int32_t x) { return _mm512_set1_epi32(x); }
FASTREC_VEC_INLINE Ints load_int(const int32_t* from, Lanes lanes) {
  return _mm512_maskz_loadu_epi32(lanes, from);
}
FASTREC_VEC_INLINE Ints add_int(Ints a, Ints b) { return _mm512_add_epi32(a, b); }
FASTREC_VEC_INLINE Ints to_int(Floats x) { return _mm512_cvtps_epi32(x); }
FASTREC_VEC_INLINE Floats to_float(Ints x) { return _mm512_cvtepi32_ps(x); }
FASTREC_VEC_INLINE Ints load_s8(const int8_t* from) {
  return _mm512_cvtepi8_epi32(_mm_loadu_si128(reinterpret_cast<const __m128i*>(from)));
}
FASTREC_VEC_INLINE Ints load_s8(const int8_t* from, Lanes lanes) {
  return _mm512_cvtepi8_epi32(_mm_maskz_loadu_epi8(lanes, from));
}
// Each lane's lowest byte: the lanes hold 0..255.
FASTREC_VEC_INLINE void store_u8(uint8_t* to, Ints x, Lanes lanes) {
  const __m128i bytes = _mm512_cvtepi32_epi8(x);
  if (all(lanes))
    _mm_storeu_si128(reinterpret_cast<__m128i*>(to), bytes);
  else
    _mm_mask_storeu_epi8(to, lanes, bytes);
}
FASTREC_VEC_INLINE Floats load_bf16(const uint16_t* from, Lanes lanes) {
  const __m512i wide = _mm512_cvtepu16_epi32(_mm256_maskz_loadu_epi16(lanes, from));
  return _mm512_castsi512_ps(_mm512_slli_epi32(wide, 16));
}
// Rounded half to even, a NaN stays a (quiet) NaN.
FASTREC_VEC_INLINE void store_bf16(uint16_t* to, Floats x, Lanes lanes) {
  const __m512i bits = _mm512_castps_si512(x);
  const __m512i odd = _mm512_and_si512(_mm512_srli_epi32(bits, 16), _mm512_set1_epi32(1));
  const __m512i half = _mm512_add_epi32(odd, _mm512_set1_epi32(0x7fff));
  const __m512i quiet = _mm512_or_si512(bits, _mm512_set1_epi32(0x400000));
  const __m512i rounded = _mm512_mask_blend_epi32(_mm512_cmp_ps_mask(x, x, _CMP_UNORD_Q),
                                                  _mm512_add_epi32(bits, half), quiet);
  const __m256i halves = _mm512_cvtepi32_epi16(_mm512_srli_epi32(rounded, 16));
  if (all(lanes))
    _mm256_storeu_si256(reinterpret_cast<__m256i*>(to), halves);
  else
    _mm256_mask_storeu_epi16(to, lanes, halves);
}

FASTREC_VEC_INLINE Floats load_f16(const uint16_t* from, Lanes lanes) {
  return _mm512_cvtph_ps(_mm256_maskz_loadu_epi16(lanes, from));
}
// Rounded half to even.
FASTREC_VEC_INLINE void store_f16(uint16_t* to, Floats x, Lanes lanes) {
  const __m256i halves = _mm512_cvtps_ph(x, _MM_FROUND_TO_NEAREST_INT | _MM_FROUND_NO_EXC);
  if (all(lanes))
    _mm256_storeu_si256(reinterpret_cast<__m256i*>(to), halves);
  else
    _mm256_mask_storeu_epi16(to, lanes, halves);
}

// Lane r: the sum of all lanes of rows[r].
FASTREC_VEC_INLINE Floats sum_rows(const Floats (&rows)[16]) {
  __m512 pair[8], four[4], eight[2];
#pragma GCC unroll 8
  for (int i = 0; i < 8; ++i)
    pair[i] = _mm512_add_ps(_mm512_unpacklo_ps(rows[2 * i], rows[2 * i + 1]),
                            _mm512_unpackhi_ps(rows[2 * i], rows[2 * i + 1]));
#pragma GCC unroll 4
  for (int i = 0; i < 4; ++i)
    four[i] = _mm512_add_ps(_mm512_shuffle_ps(pair[2 * i], pair[2 * i + 1], 0x44),
                            _mm512_shuffle_ps(pair[2 * i], pair[2 * i + 1], 0xee));
  // four[g]: rows 4g..4g+3 in each quarter; now quarters are added.
#pragma GCC unroll 2
  for (int i = 0; i < 2; ++i)
    eight[i] = _mm512_add_ps(_mm512_shuffle_f32x4(four[2 * i], four[2 * i + 1], 0x88),
                             _mm512_shuffle_f32x4(four[2 * i], four[2 * i + 1], 0xdd));
  return _mm512_add_ps(_mm512_shuffle_f32x4(eight[0], eight[1], 0x88),
                       _mm512_shuffle_f32x4(eight[0], eight[1], 0xdd));
}

// The same of row(0) to row(15).
template <class Row>
FASTREC_VEC_INLINE Floats sum_rows_of(const Row& row) {
  Floats rows[16];
#pragma GCC unroll 16
  for (int r = 0; r < 16; ++r) rows[r] = row(r);
  return sum_rows(rows);
}

// out[d][0..16) = rows[0..16)[d]: 16 dims of `count` rows (zeros for the rows behind), which start
// `stride` floats apart; nothing outside `dims` is read.
FASTREC_VEC_INLINE void transpose_tile(const float* rows, int64_t stride, int64_t count,
                                       int64_t dims, float* out, int64_t out_stride) {
  const Lanes lanes = first_lanes(dims);
  __m512 a[16], b[16];
#pragma GCC unroll 16
  for (int r = 0; r < 16; ++r) a[r] = r < count ? load(rows + r * stride, lanes) : zeros();
  // Pairs of rows, then of pairs, within each quarter of a register.
#pragma GCC unroll 8
  for (int r = 0; r < 16; r += 2) {
    b[r] = _mm512_unpacklo_ps(a[r], a[r + 1]);
    b[r + 1] = _mm512_unpackhi_ps(a[r], a[r + 1]);
  }
#pragma GCC unroll 4
  for (int r = 0; r < 16; r += 4)
#pragma GCC unroll 2
    for (int i = 0; i < 2; ++i) {
      a[r + 2 * i] = _mm512_shuffle_ps(b[r + i], b[r + i + 2], 0x44);
      a[r + 2 * i + 1] = _mm512_shuffle_ps(b[r + i], b[r + i + 2], 0xee);
    }
  // a[4g + i]: dims i, 4 + i, 8 + i, 12 + i of rows 4g..4g+3. Quarters between registers:
#pragma GCC unroll 4
  for (int i = 0; i < 4; ++i) {
    const __m512 low01 = _mm512_shuffle_f32x4(a[i], a[4 + i], 0x88);
    const __m512 low23 = _mm512_shuffle_f32x4(a[8 + i], a[12 + i], 0x88);
    const __m512 high01 = _mm512_shuffle_f32x4(a[i], a[4 + i], 0xdd);
    const __m512 high23 = _mm512_shuffle_f32x4(a[8 + i], a[12 + i], 0xdd);
    b[i] = _mm512_shuffle_f32x4(low01, low23, 0x88);
    b[8 + i] = _mm512_shuffle_f32x4(low01, low23, 0xdd);
    b[4 + i] = _mm512_shuffle_f32x4(high01, high23, 0x88);
    b[12 + i] = _mm512_shuffle_f32x4(high01, high23, 0xdd);
  }
#pragma GCC unroll 16
  for (int d = 0; d < 16; ++d)
    if (d < dims) store(out + d * out_stride, b[d]);
}

}  // namespace
}  // namespace fastrec
