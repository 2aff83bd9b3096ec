// AVX-VNNI: vpdpbusd on 8 outputs x 4 inputs; a strip is 16 outputs. For client CPUs without
// AVX-512 (Alder Lake and later); it is the AVX-512 VNNI kernel at half the width.
#if defined(__x86_64__)
#include "isa.h"
#define FASTREC_LINEAR_TARGET __attribute__((target(FASTREC_TARGET_avxvnni)))
#include "sparse_int8_linear/simd256.h"

namespace fastrec::sparse_int8_linear {
namespace {

struct AvxVnni : Simd256 {
  static constexpr Isa kIsa = Isa::avxvnni;
  static constexpr int kSets = 4;
  static constexpr int kStripOutputs = 16;
  using Element = uint8_t;

  FASTREC_LINEAR_INLINE static void start(const int32_t* from, Int& first, Int& second) {
    first = load(from);
    second = load(from + kLanes);
  }
  FASTREC_LINEAR_INLINE static void load_weights(const int8_t* values, Int& first, Int& second) {
    first = load(values);
    second = load(values + 32);
  }
  FASTREC_LINEAR_INLINE static Int broadcast(const uint8_t* x) {
    int32_t four;
    std::memcpy(&four, x, sizeof(four));
    return set(four);
  }
  FASTREC_LINEAR_INLINE static Int dot(Int sum, Int x, Int w) {
    return _mm256_dpbusd_avx_epi32(sum, x, w);
  }
  FASTREC_LINEAR_INLINE static void store_sums(int32_t* to, Int first, Int second) {
    _mm256_storeu_si256(reinterpret_cast<__m256i*>(to), first);
    _mm256_storeu_si256(reinterpret_cast<__m256i*>(to + kLanes), second);
  }
};

}  // namespace

const Kernel kAvxvnni = make_kernel<AvxVnni>();

}  // namespace fastrec::sparse_int8_linear
#endif
