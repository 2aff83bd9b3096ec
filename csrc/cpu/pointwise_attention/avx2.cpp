// AVX2: 16 queries a block, two registers; 12 sums of the 16 registers.
#include "pointwise_attention/pointwise_attention.h"

#if defined(__x86_64__)
#include "pointwise_attention/times_avx2.h"

namespace fastrec::pointwise_attention {
namespace {

constexpr int kKeys = 6, kSumVectors = 1;
constexpr int sum_rows_of_vectors(int) { return 4; }

FASTREC_VEC_INLINE Floats reciprocal(Floats x) { return divide(splat(1.0f), x); }

}  // namespace
}  // namespace fastrec::pointwise_attention

#include "pointwise_attention/vectors.h"

namespace fastrec::pointwise_attention {
const Kernel kAvx2 = {Isa::avx2, forward_floats, backward_floats, forward_any, backward_any};
}
#endif
