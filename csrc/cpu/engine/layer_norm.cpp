// layer_norm: layer_norm_quantize.
//
// operands  x [.., D] f32; residual [.., D] f32 if integers[0]; weight, bias [D] f32; x + residual
//           f32 if there is an operand for it; result f32 or u8. All contiguous
// integers  whether there is a residual, zero point of a u8 result
// numbers   eps, scale of a u8 result
#include "engine/steps.h"
#include "layer_norm_quantize/layer_norm_quantize.h"

namespace fastrec::engine {

Status run_layer_norm(const Step& step, const Tensor* operands) {
  const int residual = step.integers[0] != 0;
  const int inputs = 3 + residual, last = static_cast<int>(step.operands.size()) - 1;
  const Tensor &x = operands[0], &y = operands[last];
  layer_norm_quantize::Call call{};
  call.x = x.as<float>();
  call.residual = residual ? operands[1].as<float>() : nullptr;
  call.weight = operands[1 + residual].as<float>();
  call.bias = operands[2 + residual].as<float>();
  call.sum = last > inputs ? operands[inputs].as<float>() : nullptr;
  call.y = y.data;
  call.y_u8 = y.dtype == Dtype::u8;
  call.quantisation = {static_cast<float>(step.numbers[1]), static_cast<int32_t>(step.integers[1])};
  call.eps = static_cast<float>(step.numbers[0]);
  call.dims = x.sizes[x.dims - 1];
  call.rows = x.count() / call.dims;
  return layer_norm_quantize::run(call) ? Status{} : Status{Fault::not_a_number};
}

}  // namespace fastrec::engine
