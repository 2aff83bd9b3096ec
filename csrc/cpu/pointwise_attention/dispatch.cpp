#include <bit>
#include <cstring>

#include "cpu_features.h"
#include "parallel.h"
#include "pointwise_attention/pointwise_attention.h"
#include "scratch.h"

namespace fastrec::pointwise_attention {
namespace {

constexpr const Kernel* kKernels[] = {
#if defined(__x86_64__)
    &kAvx512,
    &kAvx2,
#endif
    &kScalar,
};

// Below this many multiply-adds a second thread costs more than it brings.
constexpr int64_t kParallelMultiplyAdds = 200'000;

int cell_of(uint64_t difference) {
  const uint64_t bits = std::bit_cast<uint64_t>(static_cast<double>(difference));
  return std::max(0, static_cast<int>(bits >> Buckets::kShift) - Buckets::kBase);
}

Buckets make_buckets(const Bias& bias) {
  Buckets buckets;
  const int64_t count = bias.buckets - 1;
  buckets.edges.assign(bias.edges, bias.edges + count);
  buckets.edges.push_back(INT64_MAX);
  const auto cell_of_edge = [&](int64_t n, int64_t before) {
    return cell_of(static_cast<uint64_t>(buckets.edges[static_cast<size_t>(n)] - before));
  };
  int64_t below = 0;
  for (int cell = 0; cell <= cell_of(kMaxTime); ++cell) {
    while (below < count && cell_of_edge(below, 0) < cell) ++below;
    // Edges that even the smallest difference of the cell has reached, then those within the cell.
    int64_t first = below;
    while (first < count && cell_of_edge(first, 0) == cell && cell_of_edge(first, 1) < cell)
      ++first;
    int64_t end = first;
    while (end < count && cell_of_edge(end, 0) == cell) ++end;
    buckets.first.push_back(static_cast<int32_t>(first));
    buckets.steps = std::max(buckets.steps, static_cast<int>(end - first));
  }
  return buckets;
}

int64_t bytes_of(Dtype dtype) { return dtype == Dtype::f32 ? 4 : 2; }

int64_t longest_of(const std::vector<Sequence>& sequences) {
  int64_t longest = 0;
  for (const Sequence& sequence : sequences) longest = std::max(longest, sequence.rows);
  return longest;
}

int threads_for(const Call& call, const std::vector<Sequence>& sequences, int64_t products) {
  int64_t pairs = 0;
  for (const Sequence& s : sequences) pairs += s.rows * s.history / (call.causal ? 2 : 1) + s.rows;
  const int64_t dims = (call.shape.dims + call.shape.value_dims) * products / 2;
  return pairs * call.shape.heads * dims < kParallelMultiplyAdds ? 1 : num_threads();
}

}  // namespace

Result sequences_of(const Shape& shape, const Bias& bias, std::vector<Sequence>* to) {
  const int64_t* starts = shape.cu_seqlens;
  if (starts && (starts[0] != 0 || (shape.batch == 0 && shape.rows != 0)))
    return {Bad::cu_seqlens, 0};
  for (int64_t b = 0; b < shape.batch; ++b) {
    Sequence sequence{b, 0, shape.rows, 0};
    if (starts) {
      const int64_t end = starts[b + 1];
      if (end < starts[b] || end > shape.rows || (b + 1 == shape.batch && end != shape.rows))
        return {Bad::cu_seqlens, b + 1};
      sequence = {0, starts[b], end - starts[b], 0};
    } else if (shape.lengths) {
      sequence.rows = shape.lengths[b];
      if (sequence.rows < 0 || sequence.rows > shape.rows) return {Bad::lengths, b};
    }
    const int64_t targets = shape.targets ? shape.targets[b] : 0;
    if (targets < 0 || targets > sequence.rows) return {Bad::targets, b};
    sequence.history = sequence.rows - targets;
    to->push_back(sequence);
  }
  for (int64_t n = 0; bias.time && n + 1 < bias.buckets; ++n) {
    const int64_t edge = bias.edges[n];
    if (edge < (n ? bias.edges[n - 1] : 1) || static_cast<uint64_t>(edge) > kMaxTime)
      return {Bad::edges, n};
  }
  return {Bad::nothing, 0};
}

Tables make_tables(const Shape& shape, const Bias& bias, int64_t longest) {
  Tables tables;
  if (bias.position) {
    const int64_t last = bias.positions - 1, count = 2 * longest + 2 * kPartRows;
    tables.origin = longest + kPartRows;
    tables.position_stride = bias.position_stride ? count : 0;
    const int64_t heads = bias.position_stride ? shape.heads : 1;
    tables.position.resize(static_cast<size_t>(heads * count));
    for (int64_t h = 0; h < heads; ++h)
      for (int64_t n = 0; n < count; ++n)
        tables.position[static_cast<size_t>(h * count + n)] =
            bias.position[h * bias.position_stride + last +
                          std::clamp(tables.origin - n, -last, last)];
  }
  if (bias.time) {
    tables.buckets = make_buckets(bias);
    const int64_t count =
        (bias.buckets + Tables::kTimeEntries - 1) / Tables::kTimeEntries * Tables::kTimeEntries;
    tables.time_stride = bias.time_stride ? count : 0;
    const int64_t heads = bias.time_stride ? shape.heads : 1;
    tables.time.resize(static_cast<size_t>(heads * count));
    for (int64_t h = 0; h < heads; ++h)
      std::copy_n(bias.time + h * bias.time_stride, bias.buckets, tables.time.data() + h * count);
  }
  return tables;
}

void clear_rows(const Shape& shape, const View& view, int64_t dims, int64_t element_bytes,
                const Sequence& sequence) {
  if (shape.cu_seqlens) return;
  for (int64_t h = 0; h < shape.heads; ++h)
    for (int64_t i = sequence.rows; i < shape.rows; ++i)
      std::memset(static_cast<char*>(view.data) + (sequence.batch * view.batch_stride +
                                                   h * view.head_stride + i * view.row_stride) *
                                                      element_bytes,
                  0, static_cast<size_t>(dims * element_bytes));
}

int32_t bucket_of(const Buckets& buckets, uint64_t difference) {
  int32_t bucket = buckets.first[static_cast<size_t>(cell_of(difference))];
  for (int step = 0; step < buckets.steps; ++step)
    bucket += static_cast<int64_t>(difference) >= buckets.edges[static_cast<size_t>(bucket)];
  return bucket;
}

const Kernel& select() { return select_kernel(kKernels); }

Result forward(const Call& call) {
  std::vector<Sequence> sequences;
  if (const Result bad = sequences_of(call.shape, call.bias, &sequences); bad.first != Bad::nothing)
    return bad;
  std::vector<Part> parts;
  for (const Sequence& sequence : sequences) {
    clear_rows(call.shape, call.out, call.shape.value_dims, bytes_of(call.shape.dtype), sequence);
    for (int64_t begin = 0; begin < sequence.rows; begin += kPartRows)
      parts.push_back({sequence, begin, std::min(begin + kPartRows, sequence.rows)});
  }
  const Tables tables = make_tables(call.shape, call.bias, longest_of(sequences));
  const Kernel& kernel = select();
  const int64_t floats = kernel.forward_floats(call);
  parallel_for(static_cast<int64_t>(parts.size()), 1, threads_for(call, sequences, 2),
               [&](int64_t begin, int64_t end) {
                 float* const memory = scratch<float>(floats);
                 for (int64_t p = begin; p < end; ++p)
                   kernel.forward(call, tables, parts[static_cast<size_t>(p)], memory);
               });
  return {Bad::nothing, 0};
}

Result backward(const Call& call, const Gradients& to) {
  std::vector<Sequence> sequences;
  if (const Result bad = sequences_of(call.shape, call.bias, &sequences); bad.first != Bad::nothing)
    return bad;
  const Shape& shape = call.shape;
  for (const Sequence& sequence : sequences) {
    clear_rows(shape, to.dq, shape.dims, bytes_of(shape.dtype), sequence);
    clear_rows(shape, to.dk, shape.dims, bytes_of(shape.dtype), sequence);
    clear_rows(shape, to.dv, shape.value_dims, bytes_of(shape.dtype), sequence);
  }
  const int64_t longest = longest_of(sequences);
  const Tables tables = make_tables(call.shape, call.bias, longest);
  const int64_t positions = to.d_position ? 2 * call.bias.positions - 1 : 0;
  const int64_t buckets = to.d_time ? call.bias.buckets : 0;
  const int64_t heads = shape.batch * shape.heads;
  std::vector<float> own(static_cast<size_t>(heads * (positions + buckets)));
  const Kernel& kernel = select();
  const int64_t floats = kernel.backward_floats(call, longest);
  parallel_for(heads, 1, threads_for(call, sequences, 5), [&](int64_t begin, int64_t end) {
    float* const memory = scratch<float>(floats);
    for (int64_t n = begin; n < end; ++n) {
      float* const tables_of_head = own.data() + n * (positions + buckets);
      kernel.backward(call, to, tables, sequences[static_cast<size_t>(n / shape.heads)],
                      n % shape.heads,
                      {to.d_position ? tables_of_head : nullptr,
                       to.d_time ? tables_of_head + positions : nullptr},
                      memory);
    }
  });
  const auto sum = [&](float* table, int64_t first, int64_t count) {
    for (int64_t h = 0; h < shape.heads; ++h)
      for (int64_t n = 0; n < count; ++n) {
        float total = 0.0f;
        for (int64_t b = 0; b < shape.batch; ++b)
          total +=
              own[static_cast<size_t>((b * shape.heads + h) * (positions + buckets) + first + n)];
        table[h * count + n] = call.inverse_norm * total;
      }
  };
  if (to.d_position) sum(to.d_position, 0, positions);
  if (to.d_time) sum(to.d_time, positions, buckets);
  return {Bad::nothing, 0};
}

}  // namespace fastrec::pointwise_attention
