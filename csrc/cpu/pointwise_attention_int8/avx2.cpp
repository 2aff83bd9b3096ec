// AVX2: 16 queries a block, 8 sums of the 16 registers; 16-bit numbers in twos, as sums of two
// products of bytes saturate.
#include "pointwise_attention_int8/pointwise_attention_int8.h"

#if defined(__x86_64__)
#include "pointwise_attention/times_avx2.h"

namespace fastrec::pointwise_attention_int8 {
namespace {

using pointwise_attention::find_buckets;
using pointwise_attention::gather;

constexpr int kQueryVectors = pointwise_attention::kQueryVectors, kAtOnce = 4, kGroup = 2,
              kOffset = 0;
using Number = int16_t;

FASTREC_VEC_INLINE Ints dot(Ints sum, Ints lanes, Ints group) {
  return add_int(
      sum, {_mm256_madd_epi16(lanes.low, group.low), _mm256_madd_epi16(lanes.high, group.high)});
}
FASTREC_VEC_INLINE Ints load_ints(const int32_t* from) {
  const auto* eights = reinterpret_cast<const __m256i*>(from);
  return {_mm256_loadu_si256(eights), _mm256_loadu_si256(eights + 1)};
}
FASTREC_VEC_INLINE void store_ints(int32_t* to, Ints x) {
  auto* const eights = reinterpret_cast<__m256i*>(to);
  _mm256_storeu_si256(eights, x.low);
  _mm256_storeu_si256(eights + 1, x.high);
}
FASTREC_VEC_INLINE __m256i pair_of(__m256i low, __m256i high) {
  return _mm256_blend_epi16(low, _mm256_slli_epi32(high, 16), 0xaa);
}
FASTREC_VEC_INLINE Ints group_of(const Ints (&numbers)[kGroup]) {
  return {pair_of(numbers[0].low, numbers[1].low), pair_of(numbers[0].high, numbers[1].high)};
}

}  // namespace
}  // namespace fastrec::pointwise_attention_int8

#include "pointwise_attention_int8/vectors.h"

namespace fastrec::pointwise_attention_int8 {
const Kernel kAvx2 = {Isa::avx2, packed_bytes, scratch_floats, pack, forward};
}
#endif
