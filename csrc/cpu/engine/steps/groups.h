// Weights [G, O, I] of grouped kernels.
#pragma once

#include "engine/check.h"

namespace fastrec::engine {

// Outputs of a constant f32 weight for rows of this width, and of its bias where there is one.
inline int64_t check_groups(const StepCheck& check, int weight, int64_t width, int bias) {
  const Shape& sizes = check.sizes(weight);
  require(sizes.size() == 3, "a weight of three dimensions");
  const int64_t groups = sizes[0].coefficient, outputs = sizes[1].coefficient,
                inputs = sizes[2].coefficient;
  require(groups > 0 && outputs > 0 && inputs > 0, "groups of weights");
  require(groups * inputs == width, "as many inputs as the weight has");
  check.table(weight, Dtype::f32, {groups, outputs, inputs});
  if (check.has(bias)) check.table(bias, Dtype::f32, {groups * outputs});
  return groups * outputs;
}

}  // namespace fastrec::engine
