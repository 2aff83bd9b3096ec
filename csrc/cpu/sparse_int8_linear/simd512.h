// 512-bit registers for vector_kernel.h: all but the dot product, which VNNI has and AVX-512 lacks.
// Included after FASTREC_LINEAR_TARGET is defined.
#pragma once

#include <immintrin.h>

#include "sparse_int8_linear/vector_kernel.h"

namespace fastrec::sparse_int8_linear {
namespace {

struct Simd512 {
  using Int = __m512i;
  using Float = __m512;
  using NotNumbers = __mmask16;
  static constexpr int kLanes = 16;
  static constexpr int kMaxRows = 12;  // 24 accumulators + 2 weights + broadcasts <= 32 registers

  FASTREC_LINEAR_INLINE static Int zero() { return _mm512_setzero_si512(); }
  FASTREC_LINEAR_INLINE static Int set(int32_t v) { return _mm512_set1_epi32(v); }
  FASTREC_LINEAR_INLINE static Float set(float v) { return _mm512_set1_ps(v); }
  FASTREC_LINEAR_INLINE static Int load(const int32_t* from) { return _mm512_loadu_si512(from); }
  FASTREC_LINEAR_INLINE static Float load_f32(const float* from) { return _mm512_loadu_ps(from); }
  FASTREC_LINEAR_INLINE static Float load_bf16(const uint16_t* from) {
    const __m256i half = _mm256_loadu_si256(reinterpret_cast<const __m256i*>(from));
    return _mm512_castsi512_ps(_mm512_slli_epi32(_mm512_cvtepu16_epi32(half), 16));
  }

  FASTREC_LINEAR_INLINE static Int add(Int a, Int b) { return _mm512_add_epi32(a, b); }
  FASTREC_LINEAR_INLINE static Float add(Float a, Float b) { return _mm512_add_ps(a, b); }
  FASTREC_LINEAR_INLINE static Float mul(Float a, Float b) { return _mm512_mul_ps(a, b); }
  FASTREC_LINEAR_INLINE static Float sub(Float a, Float b) { return _mm512_sub_ps(a, b); }
  FASTREC_LINEAR_INLINE static Float abs(Float a) { return _mm512_abs_ps(a); }
  // sixteen[the lowest 4 bits of a lane]
  FASTREC_LINEAR_INLINE static Float pick(const float* sixteen, Float number) {
    return _mm512_permutexvar_ps(_mm512_castps_si512(number), _mm512_load_ps(sixteen));
  }
  FASTREC_LINEAR_INLINE static Float min(Float a, Float b) { return _mm512_min_ps(a, b); }
  FASTREC_LINEAR_INLINE static Float max(Float a, Float b) { return _mm512_max_ps(a, b); }
  FASTREC_LINEAR_INLINE static Float fmadd(Float a, Float b, Float c) {
    return _mm512_fmadd_ps(a, b, c);
  }
  FASTREC_LINEAR_INLINE static Float to_float(Int v) { return _mm512_cvtepi32_ps(v); }
  FASTREC_LINEAR_INLINE static Int round(Float v) { return _mm512_cvtps_epi32(v); }

  FASTREC_LINEAR_INLINE static void store_f32(float* to, Float v) { _mm512_storeu_ps(to, v); }
  FASTREC_LINEAR_INLINE static void store_bf16(uint16_t* to, Float v) {
    // Round half to even on the upper 16 bits.
    const Int bits = _mm512_castps_si512(v);
    const Int odd = _mm512_and_si512(_mm512_srli_epi32(bits, 16), set(1));
    const Int rounded = add(add(bits, set(0x7fff)), odd);
    _mm256_storeu_si256(reinterpret_cast<__m256i*>(to),
                        _mm512_cvtepi32_epi16(_mm512_srli_epi32(rounded, 16)));
  }
  // 32 int32 plus the zero point, saturated to 0..255; v's lanes are put in order in the end,
  // because packing works within 128 bits.
  FASTREC_LINEAR_INLINE static void store_saturated(uint8_t* to, const Int* v, Int zero_point) {
    const Int words = _mm512_adds_epi16(_mm512_packs_epi32(v[0], v[1]), zero_point);
    const Int bytes = _mm512_packus_epi16(words, words);
    const Int order = _mm512_setr_epi32(0, 4, 8, 12, 1, 5, 9, 13, 0, 4, 8, 12, 1, 5, 9, 13);
    _mm256_storeu_si256(reinterpret_cast<__m256i*>(to),
                        _mm512_castsi512_si256(_mm512_permutexvar_epi32(order, bytes)));
  }
  FASTREC_LINEAR_INLINE static void store_saturated(uint16_t* to, const Int* v, Int zero_point) {
    alignas(32) uint8_t bytes[32];
    store_saturated(bytes, v, zero_point);
    copy_chunk(bytes, to);
  }
  FASTREC_LINEAR_INLINE static void copy_chunk(const uint8_t* from, uint8_t* to) {
    _mm256_storeu_si256(reinterpret_cast<__m256i*>(to),
                        _mm256_loadu_si256(reinterpret_cast<const __m256i*>(from)));
  }
  FASTREC_LINEAR_INLINE static void copy_chunk(const uint8_t* from, uint16_t* to) {
    const __m256i bytes = _mm256_loadu_si256(reinterpret_cast<const __m256i*>(from));
    _mm512_storeu_si512(to, _mm512_cvtepu8_epi16(bytes));
  }

  FASTREC_LINEAR_INLINE static void note_not_numbers(NotNumbers& seen, Float v) {
    seen |= _mm512_cmp_ps_mask(v, v, _CMP_UNORD_Q);
  }
  FASTREC_LINEAR_INLINE static bool any(NotNumbers seen) { return seen != 0; }
  FASTREC_LINEAR_INLINE static void prefetch(const int8_t* at) {
    _mm_prefetch(reinterpret_cast<const char*>(at), _MM_HINT_T1);
  }
};

}  // namespace
}  // namespace fastrec::sparse_int8_linear
