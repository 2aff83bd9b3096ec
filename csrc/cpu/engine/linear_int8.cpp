// linear_int8: sparse_int8_linear.
//
// operands  x [.., K] f32 or u8, contiguous or in tiles; values, group_index, panel_start, w_scale,
//           w_sum; bias if there is one; result [.., N] f32 or u8, contiguous or in tiles
// integers  N, K, x zero point, activation, whether there is a bias, y zero point, whether x is in
//           tiles, whether y is
// numbers   x scale, y scale
//
// In tiles, a buffer's last dimension has 2 * (N rounded up to a chunk) bytes: what the ISA with
// the widest elements takes. The values that depend on the weight alone are folded when the plan is
// made.
#include "engine/steps.h"
#include "sparse_int8_linear/sparse_int8_linear.h"

namespace fastrec::engine {
namespace {

namespace linear = sparse_int8_linear;

linear::Quantisation x_quantisation(const Step& step) {
  return {static_cast<float>(step.numbers[0]), static_cast<int32_t>(step.integers[2])};
}

linear::Weight weight_of(const Step& step, const Tensor* operands) {
  return {operands[1].as<int8_t>(),  operands[2].as<int32_t>(),
          operands[3].as<int32_t>(), operands[4].as<float>(),
          operands[5].as<int32_t>(), step.integers[4] ? operands[6].as<float>() : nullptr,
          step.integers[0],          step.integers[1]};
}

linear::Dtype dtype_of(const Tensor& tensor, bool tiles) {
  if (tiles) return linear::Dtype::u8_tiles;
  return tensor.dtype == Dtype::u8 ? linear::Dtype::u8 : linear::Dtype::f32;
}

}  // namespace

std::shared_ptr<void> prepare_linear_int8(const Step& step, const Tensor* operands) {
  return std::make_shared<linear::Folding>(weight_of(step, operands), x_quantisation(step));
}

Status run_linear_int8(const Step& step, const Tensor* operands) {
  const Tensor &x = operands[0], &y = operands[step.integers[4] ? 7 : 6];
  linear::Call call{};
  call.weight = weight_of(step, operands);
  call.folded = static_cast<const linear::Folding*>(step.prepared.get())->folded();
  call.x = x.data;
  call.x_dtype = dtype_of(x, step.integers[6]);
  call.x_quantisation = x_quantisation(step);
  call.rows = x.count() / step.integers[1];
  call.activation = static_cast<linear::Activation>(step.integers[3]);
  call.y = y.data;
  call.y_dtype = dtype_of(y, step.integers[7]);
  call.y_quantisation = {static_cast<float>(step.numbers[1]),
                         static_cast<int32_t>(step.integers[5])};
  return linear::run(call) ? Status{} : Status{Fault::not_a_number};
}

}  // namespace fastrec::engine
