// AVX-512: 16 entries at a time; rows a few lookups ahead are prefetched, because a table of a
// recommender does not fit the caches.
#include "int8_embedding/int8_embedding.h"

#if defined(__x86_64__)
#include <immintrin.h>

#include <algorithm>

namespace fastrec::int8_embedding {
namespace {

constexpr int kLanes = 16;
constexpr int64_t kLine = 64;
constexpr int64_t kAhead = 8;  // lookups: about one memory latency of work

__attribute__((target(FASTREC_TARGET_avx512vnni))) void gather(const Call& call, int64_t begin,
                                                               int64_t end) {
  for (int64_t i = begin; i < end; ++i) {
    const int64_t next = call.ids[std::min(i + kAhead, end - 1)];
    for (int64_t d = 0; d < call.dims; d += kLine)
      _mm_prefetch(reinterpret_cast<const char*>(call.table + next * call.dims + d), _MM_HINT_T0);
    const int8_t* row = call.table + call.ids[i] * call.dims;
    float* out = call.out + i * call.dims;
    const __m512 scale = _mm512_set1_ps(call.scale[call.ids[i]]);
    for (int64_t d = 0; d < call.dims; d += kLanes) {
      const int64_t left = call.dims - d;
      const __mmask16 lanes = left >= kLanes ? 0xffff : static_cast<__mmask16>((1u << left) - 1);
      const __m512i entries = _mm512_cvtepi8_epi32(_mm_maskz_loadu_epi8(lanes, row + d));
      const __m512 values = _mm512_mul_ps(_mm512_cvtepi32_ps(entries), scale);
      // Masked stores are many times slower than plain ones on some CPUs (AMD Zen 4).
      if (lanes == 0xffff)
        _mm512_storeu_ps(out + d, values);
      else
        _mm512_mask_storeu_ps(out + d, lanes, values);
    }
  }
}

}  // namespace

const Kernel kAvx512vnni = {Isa::avx512vnni, gather};

}  // namespace fastrec::int8_embedding
#endif
