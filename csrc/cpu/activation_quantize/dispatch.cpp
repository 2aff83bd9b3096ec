#include <algorithm>

#include "activation_quantize/activation_quantize.h"
#include "cpu_features.h"
#include "parallel_all.h"

namespace fastrec::activation_quantize {
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
  const int threads = call.count < 4 * kChunk ? 1 : num_threads();
  if (threads == 1) return kernel.elements(call, 0, call.count);
  // In whole rows of channels, or in cache lines of the output.
  const int64_t unit = call.x_type == Input::s32 ? call.channels : 64;
  const int64_t units = (call.count + unit - 1) / unit;
  const int64_t grain = std::max<int64_t>(1, kChunk / unit);
  return parallel_all(units, grain, threads, [&](int64_t begin, int64_t end) {
    return kernel.elements(call, begin * unit, std::min(end * unit, call.count));
  });
}

}  // namespace fastrec::activation_quantize
