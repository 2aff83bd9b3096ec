// AVX2: 6 rows (or taps) of 16 channels in registers, two each.
#if defined(__x86_64__)
#include "vec16_avx2.h"

namespace fastrec::separable_projection {
namespace {
constexpr int kBlock = 6;
}
}  // namespace fastrec::separable_projection

#include "separable_projection/taps.h"

namespace fastrec::separable_projection {

const Kernel kAvx2 = {Isa::avx2, convolve_rows, correlate};

}  // namespace fastrec::separable_projection
#endif
