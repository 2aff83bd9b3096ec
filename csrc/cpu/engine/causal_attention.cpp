// causal_attention: query i sees keys 0 .. i; window_sparse_attention with a window over all.
//
// operands  q, k and v [B, H, L, D] f32, D contiguous, D <= 256; result f32 [B, L, H, D] contiguous
// numbers   scale
#include "engine/steps.h"
#include "window_sparse_attention/window_sparse_attention.h"

namespace fastrec::engine {

Status run_causal_attention(const Step& step, const Tensor* operands) {
  namespace attention = window_sparse_attention;
  const Tensor& q = operands[0];
  const int64_t batch = q.sizes[0], heads = q.sizes[1], rows = q.sizes[2], dims = q.sizes[3];
  const attention::Pattern pattern{rows, true, {{}}};
  const auto view = [](const Tensor& t) {
    return attention::View{t.data, t.strides[0], t.strides[1], t.strides[2]};
  };
  attention::Forward call{};
  call.shape = {attention::Dtype::f32, batch, heads, rows, dims, nullptr, nullptr};
  call.pattern = &pattern;
  call.scale = static_cast<float>(step.numbers[0]);
  call.q = view(q);
  call.k = view(operands[1]);
  call.v = view(operands[2]);
  call.out = {operands[3].data, rows * heads * dims, dims, heads * dims};
  attention::forward(call);
  return {};
}

}  // namespace fastrec::engine
