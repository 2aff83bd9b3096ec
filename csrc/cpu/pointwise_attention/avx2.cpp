// AVX2: 16 queries a block, two registers; 12 sums of the 16 registers.
#include "pointwise_attention/pointwise_attention.h"

#if defined(__x86_64__)
#include "vec16_avx2.h"

namespace fastrec::pointwise_attention {
namespace {

constexpr int kQueryVectors = 1, kKeys = 6, kSumVectors = 1;
constexpr int sum_rows_of_vectors(int) { return 4; }

FASTREC_VEC_INLINE __m256 gather_eight(const float* table, const int32_t* numbers) {
  return _mm256_i32gather_ps(table, _mm256_loadu_si256(reinterpret_cast<const __m256i*>(numbers)),
                             sizeof(float));
}
FASTREC_VEC_INLINE Floats gather(const float* table, const int32_t* numbers) {
  return {gather_eight(table, numbers), gather_eight(table, numbers + 8)};
}

FASTREC_VEC_INLINE Floats reciprocal(Floats x) { return divide(splat(1.0f), x); }

// to[n][lane]: the bucket of the block's query `lane` and key n.
void find_buckets(const Buckets& buckets, const int64_t* query_times, const int64_t* times,
                  int64_t count, int32_t* to) {
  for (int64_t n = 0; n < count; ++n)
    for (int lane = 0; lane < kLanes; ++lane)
      to[n * kLanes + lane] = bucket_of(buckets, apart(query_times[lane], times[n]));
}

}  // namespace
}  // namespace fastrec::pointwise_attention

#include "pointwise_attention/vectors.h"

namespace fastrec::pointwise_attention {
const Kernel kAvx2 = {Isa::avx2, forward_floats, backward_floats, forward_any, backward_any};
}
#endif
