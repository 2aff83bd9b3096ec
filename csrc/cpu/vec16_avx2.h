// Sixteen lanes as two ymm registers; see vec16_avx512.h, which this mirrors name by name.
#pragma once

#include <immintrin.h>

#include <cstdint>
#include <cstring>

#include "isa.h"

#define FASTREC_VEC __attribute__((target(FASTREC_TARGET_avx2)))
#define FASTREC_VEC_INLINE FASTREC_VEC inline __attribute__((always_inline))

namespace fastrec {
namespace {

constexpr int kLanes = 16;

struct Floats {
  __m256 low, high;
};
struct Ints {
  __m256i low, high;
};
struct Lanes {
  __m256i low, high;  // all bits of a lane set, or none
  int count;
};

FASTREC_VEC_INLINE Lanes first_lanes(int64_t count) {
  const int clamped = static_cast<int>(count < 0 ? 0 : count > kLanes ? kLanes : count);
  const __m256i n = _mm256_set1_epi32(clamped);
  return {_mm256_cmpgt_epi32(n, _mm256_setr_epi32(0, 1, 2, 3, 4, 5, 6, 7)),
          _mm256_cmpgt_epi32(n, _mm256_setr_epi32(8, 9, 10, 11, 12, 13, 14, 15)), clamped};
}
FASTREC_VEC_INLINE bool all(const Lanes& lanes) { return lanes.count == kLanes; }

FASTREC_VEC_INLINE Floats zeros() { return {_mm256_setzero_ps(), _mm256_setzero_ps()}; }
FASTREC_VEC_INLINE Floats splat(float x) {
  const __m256 eight = _mm256_set1_ps(x);
  return {eight, eight};
}
FASTREC_VEC_INLINE Floats load(const float* from) {
  return {_mm256_loadu_ps(from), _mm256_loadu_ps(from + 8)};
}
FASTREC_VEC_INLINE Floats load(const float* from, const Lanes& lanes) {
  return {_mm256_maskload_ps(from, lanes.low), _mm256_maskload_ps(from + 8, lanes.high)};
}
FASTREC_VEC_INLINE void store(float* to, Floats x) {
  _mm256_storeu_ps(to, x.low);
  _mm256_storeu_ps(to + 8, x.high);
}
FASTREC_VEC_INLINE void store(float* to, Floats x, const Lanes& lanes) {
  if (all(lanes)) return store(to, x);
  _mm256_maskstore_ps(to, lanes.low, x.low);
  _mm256_maskstore_ps(to + 8, lanes.high, x.high);
}

#define FASTREC_VEC_BINARY(name, intrinsic)                      \
  FASTREC_VEC_INLINE Floats name(Floats a, Floats b) {           \
    return {intrinsic(a.low, b.low), intrinsic(a.high, b.high)}; \
  }
FASTREC_VEC_BINARY(add, _mm256_add_ps)
FASTREC_VEC_BINARY(subtract, _mm256_sub_ps)
FASTREC_VEC_BINARY(multiply, _mm256_mul_ps)
FASTREC_VEC_BINARY(divide, _mm256_div_ps)
FASTREC_VEC_BINARY(maximum, _mm256_max_ps)
FASTREC_VEC_BINARY(minimum, _mm256_min_ps)
#undef FASTREC_VEC_BINARY

FASTREC_VEC_INLINE Floats absolute(Floats x) {
  const __m256 sign = _mm256_set1_ps(-0.0f);
  return {_mm256_andnot_ps(sign, x.low), _mm256_andnot_ps(sign, x.high)};
}
FASTREC_VEC_INLINE __m256 pick(const float* sixteen, __m256 number) {
  const __m256i at = _mm256_castps_si256(number);
  return _mm256_blendv_ps(_mm256_permutevar8x32_ps(_mm256_load_ps(sixteen), at),
                          _mm256_permutevar8x32_ps(_mm256_load_ps(sixteen + 8), at),
                          _mm256_castsi256_ps(_mm256_slli_epi32(at, 28)));
}
FASTREC_VEC_INLINE Floats pick(const float* sixteen, Floats number) {
  return {pick(sixteen, number.low), pick(sixteen, number.high)};
}
FASTREC_VEC_INLINE Floats fma(Floats a, Floats b, Floats c) {
  return {_mm256_fmadd_ps(a.low, b.low, c.low), _mm256_fmadd_ps(a.high, b.high, c.high)};
}
FASTREC_VEC_INLINE Floats fnma(Floats a, Floats b, Floats c) {
  return {_mm256_fnmadd_ps(a.low, b.low, c.low), _mm256_fnmadd_ps(a.high, b.high, c.high)};
}
FASTREC_VEC_INLINE Floats round_half_even(Floats x) {
  constexpr int kMode = _MM_FROUND_TO_NEAREST_INT | _MM_FROUND_NO_EXC;
  return {_mm256_round_ps(x.low, kMode), _mm256_round_ps(x.high, kMode)};
}
FASTREC_VEC_INLINE Floats blend(const Lanes& lanes, Floats inside, Floats outside) {
  return {_mm256_blendv_ps(outside.low, inside.low, _mm256_castsi256_ps(lanes.low)),
          _mm256_blendv_ps(outside.high, inside.high, _mm256_castsi256_ps(lanes.high))};
}
// 0 where 2^n would not be a normal number.
FASTREC_VEC_INLINE __m256 power_of_two(__m256 n) {
  const __m256i biased = _mm256_max_epi32(
      _mm256_setzero_si256(), _mm256_add_epi32(_mm256_cvtps_epi32(n), _mm256_set1_epi32(127)));
  return _mm256_castsi256_ps(_mm256_slli_epi32(biased, 23));
}
FASTREC_VEC_INLINE Floats scale_by_power(Floats x, Floats n) {
  return multiply(x, {power_of_two(n.low), power_of_two(n.high)});
}

FASTREC_VEC_INLINE float sum_lanes(Floats x) {
  const __m256 eight = _mm256_add_ps(x.low, x.high);
  const __m128 four = _mm_add_ps(_mm256_castps256_ps128(eight), _mm256_extractf128_ps(eight, 1));
  const __m128 two = _mm_add_ps(four, _mm_movehl_ps(four, four));
  return _mm_cvtss_f32(_mm_add_ss(two, _mm_movehdup_ps(two)));
}
FASTREC_VEC_INLINE float max_lanes(Floats x) {
  const __m256 eight = _mm256_max_ps(x.low, x.high);
  const __m128 four = _mm_max_ps(_mm256_castps256_ps128(eight), _mm256_extractf128_ps(eight, 1));
  const __m128 two = _mm_max_ps(four, _mm_movehl_ps(four, four));
  return _mm_cvtss_f32(_mm_max_ss(two, _mm_movehdup_ps(two)));
}
FASTREC_VEC_INLINE bool any_nan(Floats x) {
  return _mm256_movemask_ps(_mm256_or_ps(_mm256_cmp_ps(x.low, x.low, _CMP_UNORD_Q),
                                         _mm256_cmp_ps(x.high, x.high, _CMP_UNORD_Q))) != 0;
}

FASTREC_VEC_INLINE Ints splat_int(int32_t x) {
  return {_mm256_set1_epi32(x), _mm256_set1_epi32(x)};
}
FASTREC_VEC_INLINE Ints load_int(const int32_t* from, const Lanes& lanes) {
  return {_mm256_maskload_epi32(from, lanes.low), _mm256_maskload_epi32(from + 8, lanes.high)};
}
FASTREC_VEC_INLINE Ints add_int(Ints a, Ints b) {
  return {_mm256_add_epi32(a.low, b.low), _mm256_add_epi32(a.high, b.high)};
}
FASTREC_VEC_INLINE Ints to_int(Floats x) {
  return {_mm256_cvtps_epi32(x.low), _mm256_cvtps_epi32(x.high)};
}
FASTREC_VEC_INLINE Floats to_float(Ints x) {
  return {_mm256_cvtepi32_ps(x.low), _mm256_cvtepi32_ps(x.high)};
}
FASTREC_VEC_INLINE Ints load_s8(const int8_t* from) {
  const __m128i bytes = _mm_loadu_si128(reinterpret_cast<const __m128i*>(from));
  return {_mm256_cvtepi8_epi32(bytes), _mm256_cvtepi8_epi32(_mm_srli_si128(bytes, 8))};
}
FASTREC_VEC_INLINE Ints load_s8(const int8_t* from, const Lanes& lanes) {
  if (all(lanes)) return load_s8(from);
  alignas(16) int8_t bytes[kLanes] = {};
  std::memcpy(bytes, from, static_cast<size_t>(lanes.count));
  return load_s8(bytes);
}
FASTREC_VEC_INLINE void store_u8(uint8_t* to, Ints x, const Lanes& lanes) {
  // Packing works within halves of a register: 0-3 8-11 4-7 12-15 in words, put in order after.
  const __m256i words =
      _mm256_permute4x64_epi64(_mm256_packus_epi32(x.low, x.high), _MM_SHUFFLE(3, 1, 2, 0));
  const __m128i packed =
      _mm_packus_epi16(_mm256_castsi256_si128(words), _mm256_extracti128_si256(words, 1));
  if (all(lanes)) return _mm_storeu_si128(reinterpret_cast<__m128i*>(to), packed);
  alignas(16) uint8_t bytes[kLanes];
  _mm_store_si128(reinterpret_cast<__m128i*>(bytes), packed);
  std::memcpy(to, bytes, static_cast<size_t>(lanes.count));
}
FASTREC_VEC_INLINE Floats load_bf16(const uint16_t* from, const Lanes& lanes) {
  alignas(32) uint16_t halves[kLanes] = {};
  if (!all(lanes)) {
    std::memcpy(halves, from, static_cast<size_t>(lanes.count) * sizeof(uint16_t));
    from = halves;
  }
  const auto* eights = reinterpret_cast<const __m128i*>(from);
  const __m256i low = _mm256_cvtepu16_epi32(_mm_loadu_si128(eights));
  const __m256i high = _mm256_cvtepu16_epi32(_mm_loadu_si128(eights + 1));
  return {_mm256_castsi256_ps(_mm256_slli_epi32(low, 16)),
          _mm256_castsi256_ps(_mm256_slli_epi32(high, 16))};
}
FASTREC_VEC_INLINE __m256i round_to_bf16(__m256 x) {
  const __m256i bits = _mm256_castps_si256(x);
  const __m256i odd = _mm256_and_si256(_mm256_srli_epi32(bits, 16), _mm256_set1_epi32(1));
  const __m256i half = _mm256_add_epi32(odd, _mm256_set1_epi32(0x7fff));
  const __m256i quiet = _mm256_or_si256(bits, _mm256_set1_epi32(0x400000));
  const __m256i nan = _mm256_castps_si256(_mm256_cmp_ps(x, x, _CMP_UNORD_Q));
  return _mm256_srli_epi32(_mm256_blendv_epi8(_mm256_add_epi32(bits, half), quiet, nan), 16);
}
FASTREC_VEC_INLINE void store_bf16(uint16_t* to, Floats x, const Lanes& lanes) {
  const __m256i packed = _mm256_permute4x64_epi64(
      _mm256_packus_epi32(round_to_bf16(x.low), round_to_bf16(x.high)), _MM_SHUFFLE(3, 1, 2, 0));
  if (all(lanes)) return _mm256_storeu_si256(reinterpret_cast<__m256i*>(to), packed);
  alignas(32) uint16_t halves[kLanes];
  _mm256_store_si256(reinterpret_cast<__m256i*>(halves), packed);
  std::memcpy(to, halves, static_cast<size_t>(lanes.count) * sizeof(uint16_t));
}

FASTREC_VEC_INLINE Floats load_f16(const uint16_t* from, const Lanes& lanes) {
  alignas(32) uint16_t halves[kLanes] = {};
  if (!all(lanes)) {
    std::memcpy(halves, from, static_cast<size_t>(lanes.count) * sizeof(uint16_t));
    from = halves;
  }
  const auto* eights = reinterpret_cast<const __m128i*>(from);
  return {_mm256_cvtph_ps(_mm_loadu_si128(eights)), _mm256_cvtph_ps(_mm_loadu_si128(eights + 1))};
}
FASTREC_VEC_INLINE void store_f16(uint16_t* to, Floats x, const Lanes& lanes) {
  constexpr int kMode = _MM_FROUND_TO_NEAREST_INT | _MM_FROUND_NO_EXC;
  alignas(32) uint16_t halves[kLanes];
  auto* eights = reinterpret_cast<__m128i*>(halves);
  _mm_store_si128(eights, _mm256_cvtps_ph(x.low, kMode));
  _mm_store_si128(eights + 1, _mm256_cvtps_ph(x.high, kMode));
  std::memcpy(to, halves, static_cast<size_t>(lanes.count) * sizeof(uint16_t));
}

template <class Row>
FASTREC_VEC_INLINE __m256 sum_eight(const Row& row, int first) {
  __m256 four[2];
#pragma GCC unroll 2
  for (int i = 0; i < 2; ++i) {
    __m256 one[4];
#pragma GCC unroll 4
    for (int r = 0; r < 4; ++r) {
      const Floats x = row(first + 4 * i + r);
      one[r] = _mm256_add_ps(x.low, x.high);
    }
    four[i] = _mm256_hadd_ps(_mm256_hadd_ps(one[0], one[1]), _mm256_hadd_ps(one[2], one[3]));
  }
  return _mm256_add_ps(_mm256_permute2f128_ps(four[0], four[1], 0x20),
                       _mm256_permute2f128_ps(four[0], four[1], 0x31));
}
// Each row is asked for when it is added: sixteen would not fit the registers.
template <class Row>
FASTREC_VEC_INLINE Floats sum_rows_of(const Row& row) {
  const __m256 low = sum_eight(row, 0);
  return {low, sum_eight(row, 8)};
}
FASTREC_VEC_INLINE Floats sum_rows(const Floats (&rows)[16]) {
  return sum_rows_of([&](int r) FASTREC_VEC __attribute__((always_inline)) { return rows[r]; });
}

FASTREC_VEC_INLINE void transpose_eight(const float* rows, int64_t stride, int64_t count,
                                        __m256i lanes, int64_t dims, float* out,
                                        int64_t out_stride) {
  __m256 a[8], b[8];
#pragma GCC unroll 8
  for (int r = 0; r < 8; ++r)
    a[r] = r < count ? _mm256_maskload_ps(rows + r * stride, lanes) : _mm256_setzero_ps();
#pragma GCC unroll 4
  for (int r = 0; r < 8; r += 2) {
    b[r] = _mm256_unpacklo_ps(a[r], a[r + 1]);
    b[r + 1] = _mm256_unpackhi_ps(a[r], a[r + 1]);
  }
#pragma GCC unroll 2
  for (int r = 0; r < 8; r += 4)
#pragma GCC unroll 2
    for (int i = 0; i < 2; ++i) {
      a[r + 2 * i] = _mm256_shuffle_ps(b[r + i], b[r + i + 2], 0x44);
      a[r + 2 * i + 1] = _mm256_shuffle_ps(b[r + i], b[r + i + 2], 0xee);
    }
#pragma GCC unroll 4
  for (int i = 0; i < 4; ++i) {
    b[i] = _mm256_permute2f128_ps(a[i], a[4 + i], 0x20);
    b[4 + i] = _mm256_permute2f128_ps(a[i], a[4 + i], 0x31);
  }
#pragma GCC unroll 8
  for (int d = 0; d < 8; ++d)
    if (d < dims) _mm256_storeu_ps(out + d * out_stride, b[d]);
}

FASTREC_VEC_INLINE void transpose_tile(const float* rows, int64_t stride, int64_t count,
                                       int64_t dims, float* out, int64_t out_stride) {
  const Lanes lanes = first_lanes(dims);
  for (int r = 0; r < kLanes; r += 8) {
    const float* from = rows + r * stride;
    transpose_eight(from, stride, count - r, lanes.low, dims, out + r, out_stride);
    if (dims > 8)
      transpose_eight(from + 8, stride, count - r, lanes.high, dims - 8, out + 8 * out_stride + r,
                      out_stride);
  }
}

}  // namespace
}  // namespace fastrec
