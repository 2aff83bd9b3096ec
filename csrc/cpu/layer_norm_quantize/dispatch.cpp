#include <algorithm>

#include "cpu_features.h"
#include "layer_norm_quantize/layer_norm_quantize.h"
#include "parallel_all.h"

namespace fastrec::layer_norm_quantize {
namespace {

constexpr const Kernel* kKernels[] = {
#if defined(__x86_64__)
    &kAvx512,
    &kAvx2,
#endif
    &kScalar,
};

// Elements that take a thread about 5 us; below four times that, one thread is as fast as two.
constexpr int64_t kChunk = 32 * 1024;

}  // namespace

const Kernel& select() { return select_kernel(kKernels); }

bool run(const Call& call) {
  const Kernel& kernel = select();
  const int threads = call.rows * call.dims < 4 * kChunk ? 1 : num_threads();
  if (threads == 1) return kernel.rows(call, 0, call.rows);
  const int64_t grain = std::max<int64_t>(1, kChunk / call.dims);
  return parallel_all(call.rows, grain, threads,
                      [&](int64_t begin, int64_t end) { return kernel.rows(call, begin, end); });
}

}  // namespace fastrec::layer_norm_quantize
