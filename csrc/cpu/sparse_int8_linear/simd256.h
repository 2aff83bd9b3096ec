// 256-bit registers for vector_kernel.h: all but the dot product, which AVX-VNNI has and AVX2
// lacks. Included after FASTREC_LINEAR_TARGET is defined.
#pragma once

#include <immintrin.h>

#include "sparse_int8_linear/vector_kernel.h"

namespace fastrec::sparse_int8_linear {
namespace {

struct Simd256 {
  using Int = __m256i;
  using Float = __m256;
  struct NotNumbers {
    uint32_t lanes = 0;
  };
  static constexpr int kLanes = 8;
  static constexpr int kMaxRows = 6;  // 12 accumulators + 2 weights + a broadcast <= 16 registers

  FASTREC_LINEAR_INLINE static Int zero() { return _mm256_setzero_si256(); }
  FASTREC_LINEAR_INLINE static Int set(int32_t v) { return _mm256_set1_epi32(v); }
  FASTREC_LINEAR_INLINE static Float set(float v) { return _mm256_set1_ps(v); }
  FASTREC_LINEAR_INLINE static Int load(const void* from) {
    return _mm256_loadu_si256(static_cast<const __m256i*>(from));
  }
  FASTREC_LINEAR_INLINE static Float load_f32(const float* from) { return _mm256_loadu_ps(from); }
  FASTREC_LINEAR_INLINE static Float load_bf16(const uint16_t* from) {
    const __m128i half = _mm_loadu_si128(reinterpret_cast<const __m128i*>(from));
    return _mm256_castsi256_ps(_mm256_slli_epi32(_mm256_cvtepu16_epi32(half), 16));
  }

  FASTREC_LINEAR_INLINE static Int add(Int a, Int b) { return _mm256_add_epi32(a, b); }
  FASTREC_LINEAR_INLINE static Float add(Float a, Float b) { return _mm256_add_ps(a, b); }
  FASTREC_LINEAR_INLINE static Float mul(Float a, Float b) { return _mm256_mul_ps(a, b); }
  FASTREC_LINEAR_INLINE static Float sub(Float a, Float b) { return _mm256_sub_ps(a, b); }
  FASTREC_LINEAR_INLINE static Float abs(Float a) {
    return _mm256_andnot_ps(_mm256_set1_ps(-0.0f), a);
  }
  // sixteen[the lowest 4 bits of a lane]
  FASTREC_LINEAR_INLINE static Float pick(const float* sixteen, Float number) {
    const __m256i at = _mm256_castps_si256(number);
    return _mm256_blendv_ps(_mm256_permutevar8x32_ps(_mm256_load_ps(sixteen), at),
                            _mm256_permutevar8x32_ps(_mm256_load_ps(sixteen + 8), at),
                            _mm256_castsi256_ps(_mm256_slli_epi32(at, 28)));
  }
  FASTREC_LINEAR_INLINE static Float min(Float a, Float b) { return _mm256_min_ps(a, b); }
  FASTREC_LINEAR_INLINE static Float max(Float a, Float b) { return _mm256_max_ps(a, b); }
  FASTREC_LINEAR_INLINE static Float fmadd(Float a, Float b, Float c) {
    return _mm256_fmadd_ps(a, b, c);
  }
  FASTREC_LINEAR_INLINE static Float to_float(Int v) { return _mm256_cvtepi32_ps(v); }
  FASTREC_LINEAR_INLINE static Int round(Float v) { return _mm256_cvtps_epi32(v); }

  FASTREC_LINEAR_INLINE static void store_f32(float* to, Float v) { _mm256_storeu_ps(to, v); }
  FASTREC_LINEAR_INLINE static void store_bf16(uint16_t* to, Float v) {
    // Round half to even on the upper 16 bits.
    const Int bits = _mm256_castps_si256(v);
    const Int odd = _mm256_and_si256(_mm256_srli_epi32(bits, 16), set(1));
    const Int rounded = add(add(bits, set(0x7fff)), odd);
    const Int upper = _mm256_srli_epi32(rounded, 16);
    _mm_storeu_si128(
        reinterpret_cast<__m128i*>(to),
        _mm_packus_epi32(_mm256_castsi256_si128(upper), _mm256_extracti128_si256(upper, 1)));
  }
  // 32 int32 plus the zero point, saturated to 0..255; v's lanes are put in order in the end,
  // because packing works within 128 bits.
  FASTREC_LINEAR_INLINE static void store_saturated(uint8_t* to, const Int* v, Int zero_point) {
    const Int first = _mm256_adds_epi16(_mm256_packs_epi32(v[0], v[1]), zero_point);
    const Int second = _mm256_adds_epi16(_mm256_packs_epi32(v[2], v[3]), zero_point);
    const Int order = _mm256_setr_epi32(0, 4, 1, 5, 2, 6, 3, 7);
    _mm256_storeu_si256(reinterpret_cast<__m256i*>(to),
                        _mm256_permutevar8x32_epi32(_mm256_packus_epi16(first, second), order));
  }
  FASTREC_LINEAR_INLINE static void store_saturated(uint16_t* to, const Int* v, Int zero_point) {
    alignas(32) uint8_t bytes[32];
    store_saturated(bytes, v, zero_point);
    copy_chunk(bytes, to);
  }
  FASTREC_LINEAR_INLINE static void copy_chunk(const uint8_t* from, uint8_t* to) {
    _mm256_storeu_si256(reinterpret_cast<__m256i*>(to), load(from));
  }
  FASTREC_LINEAR_INLINE static void copy_chunk(const uint8_t* from, uint16_t* to) {
#pragma GCC unroll 2
    for (int k = 0; k < kTileChunk; k += 16) {
      const __m128i bytes = _mm_loadu_si128(reinterpret_cast<const __m128i*>(from + k));
      _mm256_storeu_si256(reinterpret_cast<__m256i*>(to + k), _mm256_cvtepu8_epi16(bytes));
    }
  }

  FASTREC_LINEAR_INLINE static void note_not_numbers(NotNumbers& seen, Float v) {
    seen.lanes |= static_cast<uint32_t>(_mm256_movemask_ps(_mm256_cmp_ps(v, v, _CMP_UNORD_Q)));
  }
  FASTREC_LINEAR_INLINE static bool any(NotNumbers seen) { return seen.lanes != 0; }
  FASTREC_LINEAR_INLINE static void prefetch(const int8_t* at) {
    _mm_prefetch(reinterpret_cast<const char*>(at), _MM_HINT_T1);
  }
};

}  // namespace
}  // namespace fastrec::sparse_int8_linear
