// AVX-512: 16 queries a vector.
#include "attention_map_kl/attention_map_kl.h"

#if defined(__x86_64__)
#include <immintrin.h>

#include <algorithm>
#include <cmath>
#include <limits>
#include <vector>

#define FASTREC_KL __attribute__((target(FASTREC_TARGET_avx512)))
#define FASTREC_V FASTREC_KL static inline __attribute__((always_inline))

namespace fastrec::attention_map_kl {
namespace {

struct V {
  using F = __m512;
  using M = __mmask16;
  static constexpr int kWidth = 16;
  FASTREC_V F load(const float* p) { return _mm512_loadu_ps(p); }
  FASTREC_V void store(float* p, F x) { _mm512_storeu_ps(p, x); }
  FASTREC_V F all(float x) { return _mm512_set1_ps(x); }
  FASTREC_V F zero() { return _mm512_setzero_ps(); }
  FASTREC_V F add(F a, F b) { return _mm512_add_ps(a, b); }
  FASTREC_V F sub(F a, F b) { return _mm512_sub_ps(a, b); }
  FASTREC_V F mul(F a, F b) { return _mm512_mul_ps(a, b); }
  FASTREC_V F max(F a, F b) { return _mm512_max_ps(a, b); }
  FASTREC_V F fma(F a, F b, F c) { return _mm512_fmadd_ps(a, b, c); }
  FASTREC_V F choose(M mask, F a, F b) { return _mm512_mask_mov_ps(b, mask, a); }
  FASTREC_V M positive(F x) { return _mm512_cmp_ps_mask(x, zero(), _CMP_GT_OQ); }
  FASTREC_V M between(int32_t first, int32_t step, int32_t limit) {
    const __m512i lane = _mm512_setr_epi32(0, 1, 2, 3, 4, 5, 6, 7, 8, 9, 10, 11, 12, 13, 14, 15);
    const __m512i x = _mm512_add_epi32(_mm512_set1_epi32(first),
                                       _mm512_mullo_epi32(lane, _mm512_set1_epi32(step)));
    return _mm512_cmple_epu32_mask(x, _mm512_set1_epi32(limit));
  }
  // 2^n e^r, |r| <= ln(2) / 2, Taylor series to r^6 (remainder below 1.3e-7 of it); 0 below -87,
  // NaN for NaN.
  FASTREC_V F exp(F x) {
    const M kept = _mm512_cmp_ps_mask(x, all(-87.0f), _CMP_NLT_UQ);
    const F n = _mm512_roundscale_ps(mul(x, all(1.44269504088896341f)),
                                     _MM_FROUND_TO_NEAREST_INT | _MM_FROUND_NO_EXC);
    F r = _mm512_fnmadd_ps(n, all(0.693359375f), x);
    r = _mm512_fnmadd_ps(n, all(-2.12194440e-4f), r);
    F p = fma(all(1.0f / 720), r, all(1.0f / 120));
    p = fma(p, r, all(1.0f / 24));
    p = fma(p, r, all(1.0f / 6));
    p = fma(p, r, all(0.5f));
    p = fma(p, r, all(1.0f));
    p = fma(p, r, all(1.0f));
    return _mm512_maskz_scalef_ps(kept, p, n);
  }
};

}  // namespace
}  // namespace fastrec::attention_map_kl

#include "attention_map_kl/vector_kernel.h"

namespace fastrec::attention_map_kl {
const Kernel kAvx512 = {Isa::avx512, scratch_floats, head};
}
#endif
