// AVX2: no dot product of bytes. vpmaddubsw saturates (255 * 127 * 2 > 32767), so both sides are
// widened to 16 bits, where vpmaddwd is exact: the activations when their tile is packed, the
// weights as they are loaded, once for all rows of the tile. A strip is 8 outputs.
#if defined(__x86_64__)
#include "isa.h"
#define FASTREC_LINEAR_TARGET __attribute__((target(FASTREC_TARGET_avx2)))
#include "sparse_int8_linear/simd256.h"

namespace fastrec::sparse_int8_linear {
namespace {

struct Avx2 : Simd256 {
  static constexpr Isa kIsa = Isa::avx2;
  static constexpr int kStripOutputs = 8;
  static constexpr int kSets = 2;  // an addition is all that waits for the one before it
  using Element = uint16_t;

  // Each output has two sums, of its even and its odd pair of inputs.
  FASTREC_LINEAR_INLINE static void start(const int32_t* from, Int& first, Int& second) {
    first = _mm256_cvtepu32_epi64(_mm_loadu_si128(reinterpret_cast<const __m128i*>(from)));
    second = _mm256_cvtepu32_epi64(_mm_loadu_si128(reinterpret_cast<const __m128i*>(from + 4)));
  }
  FASTREC_LINEAR_INLINE static void load_weights(const int8_t* values, Int& first, Int& second) {
    first = _mm256_cvtepi8_epi16(_mm_loadu_si128(reinterpret_cast<const __m128i*>(values)));
    second = _mm256_cvtepi8_epi16(_mm_loadu_si128(reinterpret_cast<const __m128i*>(values + 16)));
  }
  FASTREC_LINEAR_INLINE static Int broadcast(const uint16_t* x) {
    int64_t four;
    std::memcpy(&four, x, sizeof(four));
    return _mm256_set1_epi64x(four);
  }
  FASTREC_LINEAR_INLINE static Int dot(Int sum, Int x, Int w) {
    return add(sum, _mm256_madd_epi16(x, w));
  }
  FASTREC_LINEAR_INLINE static void store_sums(int32_t* to, Int first, Int second) {
    // hadd works within 128 bits: outputs 0 1 4 5 | 2 3 6 7.
    const Int sums = _mm256_hadd_epi32(first, second);
    _mm256_storeu_si256(reinterpret_cast<__m256i*>(to), _mm256_permute4x64_epi64(sums, 0xd8));
  }
};

}  // namespace

const Kernel kAvx2 = make_kernel<Avx2>();

}  // namespace fastrec::sparse_int8_linear
#endif
