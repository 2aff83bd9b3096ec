// AVX-512: 12 rows (or taps) of 16 channels in registers.
#if defined(__x86_64__)
#include "vec16_avx512.h"

namespace fastrec::separable_projection {
namespace {
constexpr int kBlock = 12;
}
}  // namespace fastrec::separable_projection

#include "separable_projection/taps.h"

namespace fastrec::separable_projection {

const Kernel kAvx512 = {Isa::avx512, convolve_rows, correlate};

}  // namespace fastrec::separable_projection
#endif
