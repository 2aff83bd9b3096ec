#include <algorithm>

#include "attention_map_kl/attention_map_kl.h"
#include "cpu_features.h"
#include "parallel.h"
#include "scratch.h"

namespace fastrec::attention_map_kl {
namespace {

constexpr const Kernel* kKernels[] = {
#if defined(__x86_64__)
    &kAvx512,
    &kAvx2,
#endif
    &kScalar,
};

// Below this many multiply-adds a second thread costs more than it brings (about 20 us of work).
constexpr int64_t kParallelMultiplyAdds = 500'000;

}  // namespace

const Kernel& select() { return select_kernel(kKernels); }

int64_t run(const Call& call) {
  if (call.lengths)
    for (int64_t b = 0; b < call.batch; ++b)
      if (call.lengths[b] < 0 || call.lengths[b] > call.length) return b;
  const Kernel& kernel = select();
  const int64_t heads = call.batch * call.heads;
  int64_t far = 0;
  for (int64_t h = 0; h < call.heads; ++h) far = std::max(far, call.pattern.far_count(h));
  const int64_t seen = std::min(call.length, 2 * call.pattern.window + 1) + far;
  const int64_t dims = call.student_q.dims * (call.dq ? 3 : 1) + call.teacher_q.dims;
  const bool alone = heads * call.length * seen * dims < kParallelMultiplyAdds;
  const int64_t floats = kernel.scratch_floats(call, far);
  parallel_for(heads, 1, alone ? 1 : num_threads(), [&](int64_t begin, int64_t end) {
    float* const own = scratch<float>(floats);
    for (int64_t h = begin; h < end; ++h) kernel.head(call, h / call.heads, h % call.heads, own);
  });
  return -1;
}

}  // namespace fastrec::attention_map_kl
