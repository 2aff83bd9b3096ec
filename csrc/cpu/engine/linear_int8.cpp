// linear_int8: sparse_int8_linear.
//
// operands  x [.., K] f32 or u8, contiguous; values, group_index, panel_start, w_scale, w_sum; bias
//           if there is one; result [.., N] f32 or u8, contiguous
// integers  N, K, x zero point, activation, whether there is a bias, y zero point
// numbers   x scale, y scale
#include "engine/steps.h"
#include "sparse_int8_linear/sparse_int8_linear.h"

namespace fastrec::engine {

Status run_linear_int8(const Step& step, const Tensor* operands) {
  namespace linear = sparse_int8_linear;
  const bool has_bias = step.integers[4] != 0;
  const Tensor& x = operands[0];
  const Tensor& y = operands[has_bias ? 7 : 6];
  linear::Call call{};
  call.weight = {operands[1].as<int8_t>(),  operands[2].as<int32_t>(),
                 operands[3].as<int32_t>(), operands[4].as<float>(),
                 operands[5].as<int32_t>(), has_bias ? operands[6].as<float>() : nullptr,
                 step.integers[0],          step.integers[1]};
  call.x = x.data;
  call.x_dtype = x.dtype == Dtype::u8 ? linear::Dtype::u8 : linear::Dtype::f32;
  call.x_quantisation = {static_cast<float>(step.numbers[0]),
                         static_cast<int32_t>(step.integers[2])};
  call.rows = x.count() / step.integers[1];
  call.activation = static_cast<linear::Activation>(step.integers[3]);
  call.y = y.data;
  call.y_dtype = y.dtype == Dtype::u8 ? linear::Dtype::u8 : linear::Dtype::f32;
  call.y_quantisation = {static_cast<float>(step.numbers[1]),
                         static_cast<int32_t>(step.integers[5])};
  return linear::run(call) ? Status{} : Status{Fault::not_a_number};
}

}  // namespace fastrec::engine
