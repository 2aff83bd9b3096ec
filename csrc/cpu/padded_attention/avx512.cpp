// AVX-512: 8 rows x 3 registers of scores, 8 rows x 2 registers of dims.
#include "padded_attention/padded_attention.h"

#if defined(__x86_64__)
#include "vec16_avx512.h"

namespace fastrec::padded_attention {
namespace {
constexpr int kMaxRows = 8, kMaskedRows = 8, kScoreVectors = 3, kValueVectors = 2;
}
}  // namespace fastrec::padded_attention

#include "padded_attention/vectors.h"

namespace fastrec::padded_attention {
const Kernel kAvx512 = {Isa::avx512, scratch_floats, part, softmax};
}
#endif
