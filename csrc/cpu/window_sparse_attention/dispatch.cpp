#include <algorithm>

#include "cpu_features.h"
#include "parallel.h"
#include "scratch.h"
#include "window_sparse_attention/window_sparse_attention.h"

namespace fastrec::window_sparse_attention {
namespace {

constexpr const Kernel* kKernels[] = {
#if defined(__x86_64__)
    &kAvx512,
    &kAvx2,
#endif
    &kScalar,
};

// Rows a part: many blocks, so that a head's neighbouring keys stay in the core's caches.
constexpr int64_t kPartRows = 128;
// Below this many multiply-adds a second thread costs more than it brings.
constexpr int64_t kParallelMultiplyAdds = 200'000;

struct Sequence {
  int64_t batch, first, rows, keys;
};

// A run of rows of one sequence, for all heads.
struct Slice {
  Sequence sequence;
  int64_t begin, end;
};

struct Work {
  std::vector<Slice> slices;
  int64_t longest = 0, bad = -1;
  int64_t pairs = 0;  // at most, of one head
};

Work divide(const Shape& shape, const Pattern& pattern) {
  Work work;
  const int64_t* starts = shape.cu_seqlens;
  size_t most = 0;
  for (const auto& list : pattern.distances) most = std::max(most, list.size());
  const int64_t seen = (pattern.causal ? 1 : 2) * (pattern.window + static_cast<int64_t>(most)) + 1;
  if (starts && (starts[0] != 0 || (shape.batch == 0 && shape.rows != 0))) work.bad = 0;
  for (int64_t b = 0; b < shape.batch && work.bad < 0; ++b) {
    Sequence sequence{b, 0, shape.rows, shape.rows};
    if (starts) {
      const int64_t end = starts[b + 1];
      if (end < starts[b] || end > shape.rows || (b + 1 == shape.batch && end != shape.rows)) {
        work.bad = b + 1;
        break;
      }
      sequence = {0, starts[b], end - starts[b], end - starts[b]};
    } else if (shape.lengths) {
      sequence.keys = shape.lengths[b];
      if (sequence.keys < 0 || sequence.keys > shape.rows) work.bad = b;
    }
    work.longest = std::max(work.longest, sequence.rows);
    work.pairs += sequence.rows * std::min(seen, sequence.keys);
    // Whole blocks of lanes, but for the sequence's last.
    for (int64_t begin = 0; begin < sequence.rows; begin += kPartRows)
      work.slices.push_back({sequence, begin, std::min(begin + kPartRows, sequence.rows)});
  }
  return work;
}

// Calls body(part, scratch) for every run of rows of every head.
template <class F>
void for_each_part(const Work& work, const Shape& shape, int64_t scratch_floats, F&& body) {
  const int64_t slices = static_cast<int64_t>(work.slices.size());
  const int64_t macs = 2 * work.pairs * shape.heads * shape.dims;
  const int threads = macs < kParallelMultiplyAdds ? 1 : num_threads();
  parallel_for(slices * shape.heads, 1, threads, [&](int64_t begin, int64_t end) {
    float* memory = scratch<float>(scratch_floats);
    for (int64_t p = begin; p < end; ++p) {
      // All heads of a sequence before the next one, all slices of a head before the next one.
      const int64_t a_head = shape.batch == 1 ? slices : 1;
      const Slice& slice = work.slices[shape.batch == 1 ? p % a_head : p / shape.heads];
      const int64_t head = shape.batch == 1 ? p / a_head : p % shape.heads;
      const Sequence& sequence = slice.sequence;
      body(Part{sequence.batch, head, sequence.first, sequence.rows, sequence.keys, slice.begin,
                slice.end},
           memory);
    }
  });
}

}  // namespace

const Kernel& select() { return select_kernel(kKernels); }

int64_t forward(const Forward& call) {
  const Work work = divide(call.shape, *call.pattern);
  if (work.bad >= 0) return work.bad;
  const Kernel& kernel = select();
  for_each_part(work, call.shape,
                kernel.scratch_floats(*call.pattern, work.longest, call.shape.dims),
                [&](const Part& part, float* memory) { kernel.forward(call, part, memory); });
  return -1;
}

int64_t backward(const Backward& call) {
  const Work work = divide(call.shape, *call.pattern);
  if (work.bad >= 0) return work.bad;
  const Kernel& kernel = select();
  const int64_t floats = kernel.scratch_floats(*call.pattern, work.longest, call.shape.dims);
  // Every row's delta is there before the keys' gradients ask for it.
  for_each_part(work, call.shape, floats,
                [&](const Part& part, float*) { kernel.delta(call, part); });
  for_each_part(work, call.shape, floats, [&](const Part& part, float* memory) {
    kernel.grad_q(call, part, memory);
    kernel.grad_kv(call, part, memory);
  });
  return -1;
}

}  // namespace fastrec::window_sparse_attention
