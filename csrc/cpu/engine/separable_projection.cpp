// separable_projection: a depthwise convolution along the sequence, then a grouped projection.
//
// operands  x [B, L, C] f32, C contiguous; depthwise [C, W] and pointwise [G, O, I] f32 contiguous,
//           C = G * I, W <= 31; b [G * O] f32 if integers[0]; lengths i64 [B] contiguous if
//           integers[1]; result f32 [B, L, G * O] contiguous
// integers  whether there is a bias; whether there are lengths; taps that look back, below W
#include "separable_projection/separable_projection.h"

#include "engine/steps.h"

namespace fastrec::engine {

Status run_separable_projection(const Step& step, const Tensor* operands) {
  namespace separable = separable_projection;
  const bool has_bias = step.integers[0] != 0, has_lengths = step.integers[1] != 0;
  const Tensor &x = operands[0], &depthwise = operands[1], &pointwise = operands[2];
  const int64_t* const lengths = has_lengths ? operands[3 + has_bias].as<int64_t>() : nullptr;
  const int64_t bad = separable::forward(
      {x.data, separable::Dtype::f32, x.strides[0], x.strides[1]}, depthwise.data, pointwise.data,
      has_bias ? operands[3].data : nullptr, operands[3 + has_bias + has_lengths].data,
      {x.sizes[0], x.sizes[1], x.sizes[2], static_cast<int>(depthwise.sizes[1]),
       static_cast<int>(step.integers[2]), lengths},
      pointwise.sizes[0], pointwise.sizes[1]);
  return bad < 0 ? Status{} : Status{Fault::id_out_of_range, -1, lengths[bad]};
}

}  // namespace fastrec::engine
