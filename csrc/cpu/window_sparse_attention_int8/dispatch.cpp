#include <algorithm>
#include <atomic>
#include <cmath>
#include <type_traits>
#include <vector>

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

int64_t lines(int64_t bytes) {
  constexpr int64_t kLine = 64;
  return (bytes + kLine - 1) / kLine * kLine;
}

// The first entry of lengths or cu_seqlens that is out of order, or kDone.
int64_t first_bad(const Call& call) {
  const int64_t* starts = call.cu_seqlens;
  if (starts && (starts[0] != 0 || (call.batch == 0 && call.length != 0))) return 0;
  for (int64_t b = 0; b < call.batch; ++b) {
    if (starts && (starts[b + 1] < starts[b] || starts[b + 1] > call.length ||
                   (b + 1 == call.batch && starts[b + 1] != call.length)))
      return b + 1;
    if (call.lengths && (call.lengths[b] < 0 || call.lengths[b] > call.key_rows)) return b;
  }
  return kDone;
}

// Sequences behind each other, each as a call of its own.
std::vector<Call> calls_of(const Call& call) {
  if (!call.cu_seqlens) return {call};
  std::vector<Call> calls;
  for (int64_t b = 0; b < call.batch; ++b) {
    const int64_t first = call.cu_seqlens[b];
    Call one = call;
    one.batch = 1;
    one.length = one.key_rows = call.cu_seqlens[b + 1] - first;
    if (one.length == 0) continue;
    const auto move = [&](auto& rows, int64_t bytes) {
      using Char = std::conditional_t<std::is_same_v<decltype(rows.data), void*>, char, const char>;
      rows.data = static_cast<Char*>(rows.data) + first * rows.row_stride * bytes;
    };
    move(one.q, 1);
    move(one.k, 1);
    move(one.v, call.v_f32 ? 4 : 1);
    move(one.out, call.out_u8 ? 1 : 4);
    if (call.v_scale) one.v_scale += b * call.heads;
    calls.push_back(one);
  }
  return calls;
}

// One head of one sequence.
struct Task {
  const Call* call;
  int64_t batch, head;
  Packed packed;
  int64_t first_part;
};

// Threads for this number of query rows and of keys that one row sees at most.
int threads_for(const Call& call, int64_t rows, int64_t keys, int64_t far) {
  const int64_t seen = std::min(keys, 2 * call.pattern.window + 1) + far;
  return 2 * rows * seen * call.dims < kParallelMultiplyAdds ? 1 : num_threads();
}

// Heads of one part each: packed and computed by one thread, which still has them in its caches.
int64_t run_heads(const Call& call, const Kernel& kernel, int64_t far) {
  const int64_t heads = call.batch * call.heads;
  const int64_t bytes = kernel.packed_bytes(call), ints = kernel.scratch_ints(call, far);
  const int threads = threads_for(call, heads * call.length, call.key_rows, far);
  std::atomic<bool> finite{true};
  parallel_for(heads, 1, threads, [&](int64_t begin, int64_t end) {
    Packed packed{scratch<uint8_t>(bytes), 0.0f};
    int32_t* const own = scratch<int32_t>(ints);
    for (int64_t h = begin; h < end; ++h) {
      const int64_t batch = h / call.heads, head = h % call.heads;
      if (kernel.pack(call, batch, head, &packed))
        kernel.block(call, batch, head, packed, 0, call.length, own);
      else
        finite.store(false, std::memory_order_relaxed);
    }
  });
  return finite.load(std::memory_order_relaxed) ? kDone : kNotFinite;
}

}  // namespace

const Kernel& select() { return select_kernel(kKernels); }

int64_t run(const Call& call) {
  if (const int64_t bad = first_bad(call); bad != kDone) return bad;
  if (!(call.v_scale_of_all >= 0.0f) || !std::isfinite(call.v_scale_of_all)) return kBadScale;
  if (call.v_scale)
    for (int64_t h = 0; h < call.batch * call.heads; ++h)
      if (!(call.v_scale[h] >= 0.0f) || !std::isfinite(call.v_scale[h])) return kBadScale;
  const Kernel& kernel = select();
  int64_t far = 0;
  for (int64_t h = 0; h < call.heads; ++h) far = std::max(far, call.pattern.far_count(h));
  if (!call.cu_seqlens && call.length <= kPartRows)
    return call.length == 0 ? kDone : run_heads(call, kernel, far);
  const std::vector<Call> calls = calls_of(call);

  std::vector<Task> tasks;
  int64_t rows = 0, parts = 0, bytes = 0, longest = 0, ints = 0;
  for (const Call& one : calls) {
    const int64_t each = lines(kernel.packed_bytes(one));
    longest = std::max(longest, one.key_rows);
    ints = std::max(ints, kernel.scratch_ints(one, far));
    for (int64_t h = 0; h < one.batch * one.heads; ++h) {
      tasks.push_back({&one, h / one.heads, h % one.heads, {nullptr, 0.0f}, parts});
      rows += one.length;
      bytes += each;
      parts += (one.length + kPartRows - 1) / kPartRows;
    }
  }
  if (rows == 0) return kDone;
  const int threads = threads_for(call, rows, longest, far);
  uint8_t* memory = scratch<uint8_t>(bytes);
  for (Task& task : tasks) {
    task.packed.data = memory;
    memory += lines(kernel.packed_bytes(*task.call));
  }
  std::atomic<bool> finite{true};
  parallel_for(static_cast<int64_t>(tasks.size()), 1, threads, [&](int64_t begin, int64_t end) {
    for (int64_t t = begin; t < end; ++t)
      if (!kernel.pack(*tasks[t].call, tasks[t].batch, tasks[t].head, &tasks[t].packed))
        finite.store(false, std::memory_order_relaxed);
  });
  if (!finite.load(std::memory_order_relaxed)) return kNotFinite;

  parallel_for(parts, 1, threads, [&](int64_t begin, int64_t end) {
    int32_t* const own = scratch<int32_t>(ints);
    auto task = std::upper_bound(tasks.begin(), tasks.end(), begin,
                                 [](int64_t part, const Task& t) { return part < t.first_part; });
    --task;
    for (int64_t p = begin; p < end; ++p) {
      while (task + 1 != tasks.end() && p >= (task + 1)->first_part) ++task;
      const int64_t first = (p - task->first_part) * kPartRows;
      kernel.block(*task->call, task->batch, task->head, task->packed, first,
                   std::min(first + kPartRows, task->call->length), own);
    }
  });
  return kDone;
}

}  // namespace fastrec::window_sparse_attention_int8
