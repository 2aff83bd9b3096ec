// window_sparse_attention: query i sees the keys of its window and those at given distances.
//
// operands  q, k and v [B, H, L, D] f32, D contiguous, D <= 256; lengths i64 [B] contiguous if
//           integers[0]; result f32 [B, L, H, D] contiguous
// integers  whether there are lengths; whether query i sees no key beyond i; the window; lists of
//           distances (1, or one a head); then each list: how many, and they, rising beyond the
//           window
// numbers   scale
#include "window_sparse_attention/window_sparse_attention.h"

#include "engine/steps.h"

namespace fastrec::engine {

namespace {
namespace attention = window_sparse_attention;
}

std::shared_ptr<void> prepare_window_sparse_attention(const Step& step, const Tensor*) {
  const std::vector<int64_t>& from = step.integers;
  auto pattern = std::make_shared<attention::Pattern>();
  pattern->causal = from.at(1) != 0;
  pattern->window = from.at(2);
  size_t next = 4;
  for (int64_t list = 0; list < from.at(3); ++list) {
    const int64_t count = from.at(next++);
    std::vector<int64_t>& distances = pattern->distances.emplace_back();
    for (int64_t n = 0; n < count; ++n) distances.push_back(from.at(next++));
  }
  return pattern;
}

Status run_window_sparse_attention(const Step& step, const Tensor* operands) {
  const bool has_lengths = step.integers[0] != 0;
  const Tensor& q = operands[0];
  const int64_t batch = q.sizes[0], heads = q.sizes[1], rows = q.sizes[2], dims = q.sizes[3];
  const auto view = [](const Tensor& t) {
    return attention::View{t.data, t.strides[0], t.strides[1], t.strides[2]};
  };
  const int64_t* const lengths = has_lengths ? operands[3].as<int64_t>() : nullptr;
  attention::Forward call{};
  call.shape = {attention::Dtype::f32, batch, heads, rows, dims, lengths, nullptr};
  call.pattern = static_cast<const attention::Pattern*>(step.prepared.get());
  call.scale = static_cast<float>(step.numbers[0]);
  call.q = view(q);
  call.k = view(operands[1]);
  call.v = view(operands[2]);
  call.out = {operands[3 + has_lengths].data, rows * heads * dims, dims, heads * dims};
  const int64_t bad = attention::forward(call);
  return bad < 0 ? Status{} : Status{Fault::id_out_of_range, -1, lengths[bad]};
}

}  // namespace fastrec::engine
