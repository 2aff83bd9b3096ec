#include "cpu_features.h"
#include "parallel.h"
#include "pointwise_attention_int8/pointwise_attention_int8.h"
#include "scratch.h"

namespace fastrec::pointwise_attention_int8 {
namespace {

constexpr const Kernel* kKernels[] = {
#if defined(__x86_64__)
    &kAvx512vnni,
    &kAvx2,
#endif
    &kScalar,
};

// Below this many multiply-adds a second thread costs more than it brings.
constexpr int64_t kParallelMultiplyAdds = 500'000;

}  // namespace

const Kernel& select() { return select_kernel(kKernels); }

Result forward(const Call& call) {
  const Shape& shape = call.shape;
  std::vector<Sequence> sequences;
  if (const Result bad = sequences_of(shape, call.bias, &sequences); bad.first != Bad::nothing)
    return bad;
  const Kernel& kernel = select();
  std::vector<Part> parts;
  std::vector<int64_t> packed_at;  // of each part's sequence
  int64_t bytes = 0, longest = 0, pairs = 0;
  std::vector<std::pair<const Sequence*, int64_t>> heads_at;
  for (const Sequence& sequence : sequences) {
    clear_rows(shape, call.out, shape.value_dims, sizeof(float), sequence);
    for (int64_t begin = 0; begin < sequence.rows; begin += pointwise_attention::kPartRows) {
      parts.push_back(
          {sequence, begin, std::min(begin + pointwise_attention::kPartRows, sequence.rows)});
      packed_at.push_back(bytes);
    }
    heads_at.emplace_back(&sequence, bytes);
    bytes += shape.heads * kernel.packed_bytes(call, sequence.rows);
    longest = std::max(longest, sequence.rows);
    pairs += sequence.rows * sequence.history / (call.causal ? 2 : 1) + sequence.rows;
  }
  const Tables tables = make_tables(shape, call.bias, longest);
  const int threads = pairs * shape.heads * (shape.dims + shape.value_dims) < kParallelMultiplyAdds
                          ? 1
                          : num_threads();
  uint8_t* const packed = scratch<uint8_t>(bytes);
  parallel_for(static_cast<int64_t>(sequences.size()) * shape.heads, 1, threads,
               [&](int64_t begin, int64_t end) {
                 for (int64_t n = begin; n < end; ++n) {
                   const auto [sequence, at] = heads_at[static_cast<size_t>(n / shape.heads)];
                   const int64_t head = n % shape.heads;
                   kernel.pack(call, *sequence, head,
                               packed + at + head * kernel.packed_bytes(call, sequence->rows));
                 }
               });
  const int64_t floats = kernel.scratch_floats(call);
  parallel_for(static_cast<int64_t>(parts.size()), 1, threads, [&](int64_t begin, int64_t end) {
    float* const memory = scratch<float>(floats);
    for (int64_t p = begin; p < end; ++p)
      kernel.forward(call, tables, parts[static_cast<size_t>(p)],
                     packed + packed_at[static_cast<size_t>(p)], memory);
  });
  return {Bad::nothing, 0};
}

}  // namespace fastrec::pointwise_attention_int8
