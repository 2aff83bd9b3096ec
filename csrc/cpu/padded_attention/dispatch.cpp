#include <algorithm>

#include "cpu_features.h"
#include "padded_attention/padded_attention.h"
#include "parallel.h"
#include "scratch.h"

namespace fastrec::padded_attention {
namespace {

constexpr const Kernel* kKernels[] = {
#if defined(__x86_64__)
    &kAvx512,
    &kAvx2,
#endif
    &kScalar,
};

// Query rows a part: enough that transposing the keys once a part costs little.
constexpr int64_t kPartRows = 128;
// Below this many multiply-adds a second thread costs more than it brings.
constexpr int64_t kParallelMultiplyAdds = 200'000;

}  // namespace

const Kernel& select() { return select_kernel(kKernels); }

int64_t run(const Call& call) {
  if (call.lengths || call.starts)
    for (int64_t b = 0; b < call.batch; ++b)
      if (call.first_key(b) < 0 || call.first_key(b) > call.end_key(b) ||
          call.end_key(b) > call.key_rows)
        return b;
  const Kernel& kernel = select();
  const int64_t parts_a_head = (call.query_rows + kPartRows - 1) / kPartRows;
  const int64_t heads = call.batch * call.heads;
  const int64_t macs = 2 * heads * call.query_rows * call.key_rows * call.head_dim;
  const int threads = macs < kParallelMultiplyAdds ? 1 : num_threads();
  const int64_t scratch_floats = kernel.scratch_floats(call.key_rows, call.head_dim);
  parallel_for(heads * parts_a_head, 1, threads, [&](int64_t begin, int64_t end) {
    float* memory = scratch<float>(scratch_floats);
    for (int64_t p = begin; p < end; ++p) {
      const int64_t head = p / parts_a_head, slice = p % parts_a_head;
      kernel.part(call,
                  {head / call.heads, head % call.heads, slice * call.query_rows / parts_a_head,
                   (slice + 1) * call.query_rows / parts_a_head},
                  memory);
    }
  });
  return -1;
}

}  // namespace fastrec::padded_attention
