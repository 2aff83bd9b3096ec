// AVX-512: 32 queries a block; 24 sums of the 32 registers.
#include "pointwise_attention/pointwise_attention.h"

#if defined(__x86_64__)
#include "pointwise_attention/times_avx512.h"

namespace fastrec::pointwise_attention {
namespace {

constexpr int kKeys = 12, kSumVectors = 4;
constexpr int sum_rows_of_vectors(int vectors) { return vectors > 2 ? 4 : 8; }

// An estimate of 14 bits and a step of Newton's: off by about one spacing.
FASTREC_VEC_INLINE Floats reciprocal(Floats x) {
  const Floats estimate = _mm512_rcp14_ps(x);
  return fma(estimate, fnma(x, estimate, splat(1.0f)), estimate);
}

}  // namespace
}  // namespace fastrec::pointwise_attention

#include "pointwise_attention/vectors.h"

namespace fastrec::pointwise_attention {
const Kernel kAvx512 = {Isa::avx512, forward_floats, backward_floats, forward_any, backward_any};
}
#endif
