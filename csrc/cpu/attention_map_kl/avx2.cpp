// AVX2: 8 queries a vector.
#include "attention_map_kl/attention_map_kl.h"

#if defined(__x86_64__)
#include <immintrin.h>

#include <algorithm>
#include <cmath>
#include <limits>
#include <vector>

#define FASTREC_KL __attribute__((target(FASTREC_TARGET_avx2)))
#define FASTREC_V FASTREC_KL static inline __attribute__((always_inline))

namespace fastrec::attention_map_kl {
namespace {

struct V {
  using F = __m256;
  using M = __m256;
  static constexpr int kWidth = 8;
  FASTREC_V F load(const float* p) { return _mm256_loadu_ps(p); }
  FASTREC_V void store(float* p, F x) { _mm256_storeu_ps(p, x); }
  FASTREC_V F all(float x) { return _mm256_set1_ps(x); }
  FASTREC_V F zero() { return _mm256_setzero_ps(); }
  FASTREC_V F add(F a, F b) { return _mm256_add_ps(a, b); }
  FASTREC_V F sub(F a, F b) { return _mm256_sub_ps(a, b); }
  FASTREC_V F mul(F a, F b) { return _mm256_mul_ps(a, b); }
  FASTREC_V F max(F a, F b) { return _mm256_max_ps(a, b); }
  FASTREC_V F fma(F a, F b, F c) { return _mm256_fmadd_ps(a, b, c); }
  FASTREC_V F choose(M mask, F a, F b) { return _mm256_blendv_ps(b, a, mask); }
  FASTREC_V M positive(F x) { return _mm256_cmp_ps(x, zero(), _CMP_GT_OQ); }
  FASTREC_V M between(int32_t first, int32_t step, int32_t limit) {
    const __m256i lane = _mm256_setr_epi32(0, 1, 2, 3, 4, 5, 6, 7);
    const __m256i x = _mm256_add_epi32(_mm256_set1_epi32(first),
                                       _mm256_mullo_epi32(lane, _mm256_set1_epi32(step)));
    // Unsigned: a negative x is larger than any limit.
    const __m256i least = _mm256_min_epu32(x, _mm256_set1_epi32(limit));
    return _mm256_castsi256_ps(_mm256_cmpeq_epi32(least, x));
  }
  // 2^n e^r, |r| <= ln(2) / 2, Taylor series to r^6 (remainder below 1.3e-7 of it); 0 below -87,
  // NaN for NaN.
  FASTREC_V F exp(F x) {
    const M kept = _mm256_cmp_ps(x, all(-87.0f), _CMP_NLT_UQ);
    x = max(all(-87.0f), x);  // in this order a NaN stays
    const F n = _mm256_round_ps(mul(x, all(1.44269504088896341f)),
                                _MM_FROUND_TO_NEAREST_INT | _MM_FROUND_NO_EXC);
    F r = _mm256_fnmadd_ps(n, all(0.693359375f), x);
    r = _mm256_fnmadd_ps(n, all(-2.12194440e-4f), r);
    F p = fma(all(1.0f / 720), r, all(1.0f / 120));
    p = fma(p, r, all(1.0f / 24));
    p = fma(p, r, all(1.0f / 6));
    p = fma(p, r, all(0.5f));
    p = fma(p, r, all(1.0f));
    p = fma(p, r, all(1.0f));
    const __m256i power =
        _mm256_slli_epi32(_mm256_add_epi32(_mm256_cvtps_epi32(n), _mm256_set1_epi32(127)), 23);
    return _mm256_and_ps(kept, mul(p, _mm256_castsi256_ps(power)));
  }
};

}  // namespace
}  // namespace fastrec::attention_map_kl

#include "attention_map_kl/vector_kernel.h"

namespace fastrec::attention_map_kl {
const Kernel kAvx2 = {Isa::avx2, scratch_floats, head};
}
#endif
