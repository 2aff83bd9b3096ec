// AVX-512 VNNI: vpdpbusd multiplies and adds 16 outputs x 4 inputs at once; a strip is a panel.
#if defined(__x86_64__)
#include "isa.h"
#define FASTREC_LINEAR_TARGET __attribute__((target(FASTREC_TARGET_avx512vnni)))
#include "sparse_int8_linear/simd512.h"

namespace fastrec::sparse_int8_linear {
namespace {

struct Avx512Vnni : Simd512 {
  static constexpr Isa kIsa = Isa::avx512vnni;
  static constexpr int kSets = 4;
  static constexpr int kStripOutputs = 32;
  using Element = uint8_t;

  FASTREC_LINEAR_INLINE static void start(const int32_t* from, Int& first, Int& second) {
    first = load(from);
    second = load(from + kLanes);
  }
  FASTREC_LINEAR_INLINE static void load_weights(const int8_t* values, Int& first, Int& second) {
    first = _mm512_loadu_si512(values);
    second = _mm512_loadu_si512(values + 64);
  }
  FASTREC_LINEAR_INLINE static Int broadcast(const uint8_t* x) {
    int32_t four;
    std::memcpy(&four, x, sizeof(four));
    return set(four);
  }
  FASTREC_LINEAR_INLINE static Int dot(Int sum, Int x, Int w) {
    return _mm512_dpbusd_epi32(sum, x, w);
  }
  FASTREC_LINEAR_INLINE static void store_sums(int32_t* to, Int first, Int second) {
    _mm512_storeu_si512(to, first);
    _mm512_storeu_si512(to + kLanes, second);
  }
};

}  // namespace

const Kernel kAvx512vnni = make_kernel<Avx512Vnni>();

}  // namespace fastrec::sparse_int8_linear
#endif
