// quantize: activation_quantize of floats.
//
// operands  x f32, result u8 of as many elements, both contiguous
// integers  the result's zero point
// numbers   its scale
#include "activation_quantize/activation_quantize.h"
#include "engine/steps.h"

namespace fastrec::engine {

Status run_quantize(const Step& step, const Tensor* operands) {
  namespace op = activation_quantize;
  op::Call call{};
  call.x = operands[0].data;
  call.x_type = op::Input::f32;
  call.y = operands[1].data;
  call.y_type = op::Output::u8;
  call.quantisation = {static_cast<float>(step.numbers[0]), static_cast<int32_t>(step.integers[0])};
  call.count = operands[0].count();
  return op::run(call) ? Status{} : Status{Fault::not_a_number};
}

}  // namespace fastrec::engine
