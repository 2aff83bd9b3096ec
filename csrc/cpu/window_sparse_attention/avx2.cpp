// AVX2, 16 lanes in two registers: 6 scores are 12 of the 16, 4 rows x 16 dims of sums 8.
#include "window_sparse_attention/window_sparse_attention.h"

#if defined(__x86_64__)
#include "vec16_avx2.h"

namespace fastrec::window_sparse_attention {
namespace {
constexpr int kNearKeys = 6, kSumRows = 4, kSumVectors = 1;
}
}  // namespace fastrec::window_sparse_attention

#include "window_sparse_attention/vectors.h"

namespace fastrec::window_sparse_attention {
const Kernel kAvx2 = {Isa::avx2, scratch_floats, forward_any, delta_any, grad_q_any, grad_kv_any};
}
#endif
