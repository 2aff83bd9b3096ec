#include "cpu_features.h"
#include "int8_embedding/int8_embedding.h"
#include "parallel.h"

namespace fastrec::int8_embedding {
namespace {

constexpr const Kernel* kKernels[] = {
#if defined(__x86_64__)
    &kAvx512,
    &kAvx2,
#endif
    &kScalar,
};

constexpr int64_t kChunk = 256;  // lookups a thread claims at a time

}  // namespace

const Kernel& select() { return select_kernel(kKernels); }

int64_t run(const Call& call) {
  for (int64_t i = 0; i < call.count; ++i)
    if (call.ids[i] < 0 || call.ids[i] >= call.rows) return i;
  const Kernel& kernel = select();
  parallel_for(call.count, kChunk, num_threads(),
               [&](int64_t begin, int64_t end) { kernel.gather(call, begin, end); });
  return -1;
}

}  // namespace fastrec::int8_embedding
