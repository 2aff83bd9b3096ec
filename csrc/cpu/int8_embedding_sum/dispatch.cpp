#include <algorithm>

#include "cpu_features.h"
#include "int8_embedding_sum/int8_embedding_sum.h"
#include "parallel_all.h"

namespace fastrec::int8_embedding_sum {
namespace {

constexpr const Kernel* kKernels[] = {
#if defined(__x86_64__)
    &kAvx512,
    &kAvx2,
#endif
    &kScalar,
};

// Entries read by a thread at a time, about 10 us; below four times that, one thread is enough.
constexpr int64_t kChunk = 32 * 1024;

}  // namespace

const Kernel& select() { return select_kernel(kKernels); }

Result check(const Call& call, int64_t begin, int64_t end) {
  for (int t = 0; t < call.table_count; ++t) {
    const Table& table = call.tables[t];
    if (!table.ids) continue;
    for (int64_t n = begin; n < end; ++n) {
      const int64_t id = table.ids[n];
      // As unsigned, so that a negative id is too large as well.
      const bool outside = static_cast<uint64_t>(id) >= static_cast<uint64_t>(table.count);
      if (outside && !(table.padding_id >= 0 && id == table.padding_id))
        return {Status::bad_id, t, n};
    }
  }
  return {Status::done, 0, 0};
}

Result run(const Call& call) {
  if (const Result bad = check(call, 0, call.rows); bad.status != Status::done) return bad;
  const Kernel& kernel = select();
  const int64_t entries = std::max<int64_t>(1, call.dims * call.table_count);
  const int threads = call.rows * entries < 4 * kChunk ? 1 : num_threads();
  const int64_t grain = std::max<int64_t>(1, threads == 1 ? call.rows : kChunk / entries);
  const bool numbers = parallel_all(call.rows, grain, threads, [&](int64_t begin, int64_t end) {
    return kernel.gather(call, begin, end);
  });
  return {numbers ? Status::done : Status::not_a_number, 0, 0};
}

}  // namespace fastrec::int8_embedding_sum
