// Entries of tables for the lanes of a block of queries.
#pragma once

#include "pointwise_attention/pointwise_attention.h"
#include "vec16_avx512.h"

namespace fastrec::pointwise_attention {
namespace {

constexpr int kQueryVectors = 2;

// Thirty-two entries by the lowest five bits.
FASTREC_VEC_INLINE Floats pick_of_32(const float* table, __m512i number) {
  return _mm512_permutex2var_ps(_mm512_loadu_ps(table), number, _mm512_loadu_ps(table + kLanes));
}

// table[numbers], a table of Tables. A gather of sixteen took about 50 cycles where it was
// measured; the first 128 entries, where most differences of times lie, are picked by permutations.
FASTREC_VEC_INLINE Floats gather(const float* table, const int32_t* numbers) {
  const __m512i number = _mm512_loadu_si512(numbers);
  if (_mm512_cmpge_epi32_mask(number, _mm512_set1_epi32(Tables::kTimeEntries)))
    return _mm512_i32gather_ps(number, table, sizeof(float));
  const __mmask16 by_32 = _mm512_test_epi32_mask(number, _mm512_set1_epi32(32));
  const __mmask16 by_64 = _mm512_test_epi32_mask(number, _mm512_set1_epi32(64));
  const Floats low =
      _mm512_mask_blend_ps(by_32, pick_of_32(table, number), pick_of_32(table + 32, number));
  const Floats high =
      _mm512_mask_blend_ps(by_32, pick_of_32(table + 64, number), pick_of_32(table + 96, number));
  return _mm512_mask_blend_ps(by_64, low, high);
}

// Buckets of eight differences as doubles that are exact.
FASTREC_VEC_INLINE __m256i buckets_of_eight(const Buckets& buckets, __m512i queries, __m512i key) {
  const __m512i apart = _mm512_min_epu64(
      _mm512_sub_epi64(_mm512_max_epi64(queries, key), _mm512_min_epi64(queries, key)),
      _mm512_set1_epi64(static_cast<int64_t>(kMaxTime)));
  const __m512i bits = _mm512_castpd_si512(_mm512_cvtepu64_pd(apart));
  const __m512i cell = _mm512_max_epi64(_mm512_setzero_si512(),
                                        _mm512_sub_epi64(_mm512_srli_epi64(bits, Buckets::kShift),
                                                         _mm512_set1_epi64(Buckets::kBase)));
  __m256i bucket = _mm512_i64gather_epi32(cell, buckets.first.data(), sizeof(int32_t));
  for (int step = 0; step < buckets.steps; ++step) {
    const __m512i edge = _mm512_i32gather_epi64(bucket, buckets.edges.data(), sizeof(int64_t));
    bucket = _mm256_mask_add_epi32(bucket, _mm512_cmpge_epi64_mask(apart, edge), bucket,
                                   _mm256_set1_epi32(1));
  }
  return bucket;
}

// to[n][lane]: the bucket of the block's query `lane` and key n.
FASTREC_VEC __attribute__((noinline)) void find_buckets(const Buckets& buckets,
                                                        const int64_t* query_times,
                                                        const int64_t* times, int64_t count,
                                                        int32_t* to) {
  for (int64_t n = 0; n < count; ++n) {
    const __m512i key = _mm512_set1_epi64(times[n]);
#pragma GCC unroll 4
    for (int lane = 0; lane < kQueryVectors * kLanes; lane += 8)
      _mm256_storeu_si256(reinterpret_cast<__m256i*>(to + n * kQueryVectors * kLanes + lane),
                          buckets_of_eight(buckets, _mm512_loadu_si512(query_times + lane), key));
  }
}

}  // namespace
}  // namespace fastrec::pointwise_attention
