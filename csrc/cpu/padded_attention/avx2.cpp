// AVX2: 6 rows x 16 keys or dims are 12 of the 16 registers.
#include "padded_attention/padded_attention.h"

#if defined(__x86_64__)
#include "vec16_avx2.h"

namespace fastrec::padded_attention {
namespace {
constexpr int kMaxRows = 6, kMaskedRows = 5, kScoreVectors = 1, kValueVectors = 1;
}
}  // namespace fastrec::padded_attention

#include "padded_attention/vectors.h"

namespace fastrec::padded_attention {
const Kernel kAvx2 = {Isa::avx2, scratch_floats, part, softmax};
}
#endif
