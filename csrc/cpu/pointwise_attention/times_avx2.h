// Entries of tables for the lanes of a block of queries.
#pragma once

#include "pointwise_attention/pointwise_attention.h"
#include "vec16_avx2.h"

namespace fastrec::pointwise_attention {
namespace {

constexpr int kQueryVectors = 1;

FASTREC_VEC_INLINE __m256 gather_eight(const float* table, const int32_t* numbers) {
  return _mm256_i32gather_ps(table, _mm256_loadu_si256(reinterpret_cast<const __m256i*>(numbers)),
                             sizeof(float));
}
FASTREC_VEC_INLINE Floats gather(const float* table, const int32_t* numbers) {
  return {gather_eight(table, numbers), gather_eight(table, numbers + 8)};
}

// to[n][lane]: the bucket of the block's query `lane` and key n.
void find_buckets(const Buckets& buckets, const int64_t* query_times, const int64_t* times,
                  int64_t count, int32_t* to) {
  for (int64_t n = 0; n < count; ++n)
    for (int lane = 0; lane < kLanes; ++lane)
      to[n * kLanes + lane] = bucket_of(buckets, apart(query_times[lane], times[n]));
}

}  // namespace
}  // namespace fastrec::pointwise_attention
