#include "window_sparse_attention.h"

namespace fastrec::onnxruntime {

namespace {

namespace attention = window_sparse_attention;

constexpr auto kF32 = ONNX_TENSOR_ELEMENT_DATA_TYPE_FLOAT;
constexpr auto kS64 = ONNX_TENSOR_ELEMENT_DATA_TYPE_INT64;

std::vector<std::vector<int64_t>> lists_of(const std::vector<int64_t>& from, int64_t window) {
  require(!from.empty() && from[0] >= 1, "a pattern of at least one list");
  std::vector<std::vector<int64_t>> lists;
  size_t next = 1;
  for (int64_t n = 0; n < from[0]; ++n) {
    require(next < from.size(), "as many lists as the pattern says");
    const int64_t count = from[next++];
    require(count >= 0 && count <= static_cast<int64_t>(from.size() - next),
            "as many distances as the pattern says");
    std::vector<int64_t>& list = lists.emplace_back();
    for (int64_t d = 0; d < count; ++d) {
      list.push_back(from[next++]);
      require(list.back() > (d ? list[d - 1] : window), "distances that rise beyond the window");
    }
  }
  require(next == from.size(), "nothing behind the pattern's lists");
  return lists;
}

}  // namespace

Signature WindowSparseAttention::signature() { return {{kF32, kF32, kF32, kS64}, 1, kF32}; }

WindowSparseAttention::WindowSparseAttention(const Node& node)
    : has_lengths_(node.inputs() > 3), scale_(node.number("scale")) {
  pattern_.window = node.integer("window");
  pattern_.causal = node.integer("causal") != 0;
  require(pattern_.window >= 0, "a window of 0 or more");
  pattern_.distances = lists_of(node.integers("pattern"), pattern_.window);
}

void WindowSparseAttention::run(const Call& call) const {
  const Value q = call.input(0), k = call.input(1), v = call.input(2);
  require(q.shape.size() == 4 && q.shape == k.shape && q.shape == v.shape,
          "q, k and v of one shape [B, H, L, D]");
  const int64_t batch = q.shape[0], heads = q.shape[1], rows = q.shape[2], dims = q.shape[3];
  require(dims >= 1 && dims <= attention::kMaxDims, "heads of 1 to 256");
  const size_t lists = pattern_.distances.size();
  require(lists == 1 || lists == static_cast<size_t>(heads), "a list of distances a head");
  const Value lengths = has_lengths_ ? call.input(3) : Value{};
  require(!has_lengths_ || lengths.count() == batch, "a length for each of B");
  const Value out = call.output(0, q.shape);
  const auto view = [&](const Value& x) {
    return attention::View{x.data, heads * rows * dims, rows * dims, dims};
  };
  attention::Forward work{};
  work.shape = {attention::Dtype::f32, batch, heads, rows, dims, lengths.as<int64_t>(), nullptr};
  work.pattern = &pattern_;
  work.scale = scale_;
  work.q = view(q);
  work.k = view(k);
  work.v = view(v);
  work.out = view(out);
  if (attention::forward(work) >= 0) throw std::invalid_argument("lengths: expected each in 0..L");
}

}  // namespace fastrec::onnxruntime
