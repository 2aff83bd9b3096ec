// grouped_linear: each group of channels by its own matrix.
//
// operands  x [.., G * I] f32; W [G, O, I] f32; b [G * O] f32 if integers[0]; result f32
//           [.., G * O]. All contiguous
// integers  whether there is a bias; whether output o of group g is channel o * G + g
#include "grouped_linear/grouped_linear.h"

#include "engine/steps.h"

namespace fastrec::engine {

Status run_grouped_linear(const Step& step, const Tensor* operands) {
  namespace grouped = grouped_linear;
  const bool has_bias = step.integers[0] != 0, shuffle = step.integers[1] != 0;
  const Tensor &x = operands[0], &weight = operands[1];
  const int64_t groups = weight.sizes[0], outputs = weight.sizes[1], inputs = weight.sizes[2];
  const auto f32 = grouped::Dtype::f32;
  grouped::forward({x.data, f32, groups * inputs, {inputs, 1}}, weight.data,
                   has_bias ? operands[2].data : nullptr,
                   {operands[2 + has_bias].data, f32, groups * outputs,
                    shuffle ? grouped::Channels{1, groups} : grouped::Channels{outputs, 1}},
                   {x.count() / (groups * inputs), groups, outputs, inputs});
  return {};
}

}  // namespace fastrec::engine
