#include <algorithm>
#include <atomic>
#include <cmath>

#include "cpu_features.h"
#include "parallel.h"
#include "scratch.h"
#include "window_sparse_attention_int8/window_sparse_attention_int8.h"

namespace fastrec::window_sparse_attention_int8 {
namespace {

constexpr const Kernel* kKernels[] = {
#if defined(__x86_64__)
    &kAvx512vnni,
    &kAvx2,
#endif
    &kScalar,
};

// Below this many multiply-adds a second thread costs more than it brings (about 10 us of work).
constexpr int64_t kParallelMultiplyAdds = 500'000;
// Query rows a part: blocks that share most of their window's keys stay on one thread.
constexpr int64_t kPartRows = 8 * kBlockRows;

}  // namespace

const Kernel& select() { return select_kernel(kKernels); }

int64_t run(const Call& call) {
  if (call.lengths)
    for (int64_t b = 0; b < call.batch; ++b)
      if (call.lengths[b] < 0 || call.lengths[b] > call.length) return b;
  const int64_t heads = call.batch * call.heads;
  if (call.v_scale)
    for (int64_t h = 0; h < heads; ++h)
      if (!(call.v_scale[h] >= 0.0f) || !std::isfinite(call.v_scale[h])) return kBadScale;
  if (heads == 0 || call.length == 0) return kDone;
  const Kernel& kernel = select();
  int64_t far = 0;
  for (int64_t h = 0; h < call.heads; ++h) far = std::max(far, call.pattern.far_count(h));
  const int64_t seen = std::min(call.length, 2 * call.pattern.window + 1) + far;
  const bool alone = 2 * heads * call.length * seen * call.dims < kParallelMultiplyAdds;
  const int threads = alone ? 1 : num_threads();

  constexpr int64_t kLine = 64;
  const int64_t bytes = (kernel.packed_bytes(call) + kLine - 1) / kLine * kLine;
  const int64_t table = (heads * int64_t{sizeof(Packed)} + kLine - 1) / kLine * kLine;
  uint8_t* const memory = scratch<uint8_t>(table + heads * bytes);
  auto* const packed = reinterpret_cast<Packed*>(memory);
  std::atomic<bool> finite{true};
  parallel_for(heads, 1, threads, [&](int64_t begin, int64_t end) {
    for (int64_t h = begin; h < end; ++h) {
      packed[h] = {memory + table + h * bytes, 0.0f};
      if (!kernel.pack(call, h / call.heads, h % call.heads, &packed[h]))
        finite.store(false, std::memory_order_relaxed);
    }
  });
  if (!finite.load(std::memory_order_relaxed)) return kNotFinite;

  const int64_t parts_a_head = (call.length + kPartRows - 1) / kPartRows;
  const int64_t ints = kernel.scratch_ints(call, far);
  parallel_for(heads * parts_a_head, 1, threads, [&](int64_t begin, int64_t end) {
    int32_t* const own = scratch<int32_t>(ints);
    for (int64_t p = begin; p < end; ++p) {
      const int64_t h = p / parts_a_head, first = p % parts_a_head * kPartRows;
      kernel.block(call, h / call.heads, h % call.heads, packed[h], first,
                   std::min(first + kPartRows, call.length), own);
    }
  });
  return kDone;
}

}  // namespace fastrec::window_sparse_attention_int8
