// AVX-512: 24 scores, or 8 rows x 32 dims of sums, of the 32 registers.
#include "window_sparse_attention/window_sparse_attention.h"

#if defined(__x86_64__)
#include "vec16_avx512.h"

namespace fastrec::window_sparse_attention {
namespace {
constexpr int kNearKeys = 24, kSumRows = 8, kSumVectors = 2;
}
}  // namespace fastrec::window_sparse_attention

#include "window_sparse_attention/vectors.h"

namespace fastrec::window_sparse_attention {
const Kernel kAvx512 = {Isa::avx512, scratch_floats, forward_any,
                        delta_any,   grad_q_any,     grad_kv_any};
}
#endif
