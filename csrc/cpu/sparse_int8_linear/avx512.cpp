// AVX-512 without VNNI: as in avx2.cpp, at twice the width; a strip is 16 outputs.
#if defined(__x86_64__)
#include "isa.h"
#define FASTREC_LINEAR_TARGET __attribute__((target(FASTREC_TARGET_avx512)))
#include "sparse_int8_linear/simd512.h"

namespace fastrec::sparse_int8_linear {
namespace {

struct Avx512 : Simd512 {
  static constexpr Isa kIsa = Isa::avx512;
  static constexpr int kSets = 4;
  static constexpr int kStripOutputs = 16;
  using Element = uint16_t;

  // Each output has two sums, of its even and its odd pair of inputs.
  FASTREC_LINEAR_INLINE static void start(const int32_t* from, Int& first, Int& second) {
    first = _mm512_cvtepu32_epi64(_mm256_loadu_si256(reinterpret_cast<const __m256i*>(from)));
    second = _mm512_cvtepu32_epi64(_mm256_loadu_si256(reinterpret_cast<const __m256i*>(from + 8)));
  }
  FASTREC_LINEAR_INLINE static void load_weights(const int8_t* values, Int& first, Int& second) {
    first = _mm512_cvtepi8_epi16(_mm256_loadu_si256(reinterpret_cast<const __m256i*>(values)));
    second =
        _mm512_cvtepi8_epi16(_mm256_loadu_si256(reinterpret_cast<const __m256i*>(values + 32)));
  }
  FASTREC_LINEAR_INLINE static Int broadcast(const uint16_t* x) {
    int64_t four;
    std::memcpy(&four, x, sizeof(four));
    return _mm512_set1_epi64(four);
  }
  FASTREC_LINEAR_INLINE static Int dot(Int sum, Int x, Int w) {
    return add(sum, _mm512_madd_epi16(x, w));
  }
  FASTREC_LINEAR_INLINE static void store_sums(int32_t* to, Int first, Int second) {
    const Int even = _mm512_setr_epi32(0, 2, 4, 6, 8, 10, 12, 14, 16, 18, 20, 22, 24, 26, 28, 30);
    const Int odd = add(even, set(1));
    _mm512_storeu_si512(to, add(_mm512_permutex2var_epi32(first, even, second),
                                _mm512_permutex2var_epi32(first, odd, second)));
  }
};

}  // namespace

const Kernel kAvx512 = make_kernel<Avx512>();

}  // namespace fastrec::sparse_int8_linear
#endif
