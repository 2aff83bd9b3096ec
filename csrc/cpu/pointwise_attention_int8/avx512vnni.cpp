// AVX-512 VNNI: 32 queries a block, 16 sums of the 32 registers; bytes in fours.
#include "pointwise_attention_int8/pointwise_attention_int8.h"

#if defined(__x86_64__)
#include "pointwise_attention/times_avx512.h"

#undef FASTREC_VEC
#define FASTREC_VEC __attribute__((target(FASTREC_TARGET_avx512vnni)))

namespace fastrec::pointwise_attention_int8 {
namespace {

using pointwise_attention::find_buckets;
using pointwise_attention::gather;

constexpr int kQueryVectors = pointwise_attention::kQueryVectors, kAtOnce = 8, kGroup = 4,
              kOffset = 128;
using Number = int8_t;

// In assembly: around the intrinsic gcc 12 copies sums to other registers, until some spill.
FASTREC_VEC_INLINE Ints dot(Ints sum, Ints lanes, Ints group) {
  asm("vpdpbusd %2, %1, %0" : "+v"(sum) : "v"(lanes), "v"(group));
  return sum;
}
FASTREC_VEC_INLINE Ints load_ints(const int32_t* from) { return _mm512_loadu_si512(from); }
FASTREC_VEC_INLINE void store_ints(int32_t* to, Ints x) { _mm512_storeu_si512(to, x); }
FASTREC_VEC_INLINE Ints group_of(const Ints (&numbers)[kGroup]) {
  const Ints low = _mm512_or_si512(numbers[0], _mm512_slli_epi32(numbers[1], 8));
  const Ints high = _mm512_or_si512(numbers[2], _mm512_slli_epi32(numbers[3], 8));
  return _mm512_or_si512(low, _mm512_slli_epi32(high, 16));
}

}  // namespace
}  // namespace fastrec::pointwise_attention_int8

#include "pointwise_attention_int8/vectors.h"

namespace fastrec::pointwise_attention_int8 {
const Kernel kAvx512vnni = {Isa::avx512vnni, packed_bytes, scratch_floats, pack, forward};
}
#endif
