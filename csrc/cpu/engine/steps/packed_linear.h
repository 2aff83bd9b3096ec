// y = x W^T + b in fp32, on the micro-kernel of grouped_linear with one group; the weight is packed
// into panels once, when the plan is made.
//
// x [.., K] f32 contiguous; weight [N, K] f32, a constant; bias [N] f32; y f32 [.., N] contiguous.
#pragma once

#include <memory>
#include <vector>

#include "activation_quantize/activation_quantize.h"
#include "engine/make_kind.h"
#include "grouped_linear/grouped_linear.h"

namespace fastrec::engine {

// How a kernel multiplies with a weight.
struct PackedWeight {
  const grouped_linear::Kernel* kernel;
  std::vector<float> memory;
  grouped_linear::Panels panels;
};

// The weight [N, K] and the bias, which may be absent, in panels of fp32.
std::shared_ptr<PackedWeight> packed_weight(const Tensor& weight, const Tensor& bias);

// The part that linear and linear_bf16 share.
struct PackedLinear {
  enum { x, weight, bias, y };
  static constexpr OperandRule operands[] = {{.name = "x"},
                                             {.name = "weight"},
                                             {.name = "bias", .optional = true},
                                             {.name = "y", .output = true}};
  struct Fields {
    activation_quantize::Activation activation = activation_quantize::Activation::none;

    template <class V>
    void each(V& visit) {
      visit("activation", activation, activation_quantize::kActivationNames);
    }
  };

  static Rows rows(const Fields&) { return Rows::last; }
  static void check(const StepCheck& check, const Fields& fields);
  static std::shared_ptr<void> prepare(const Fields& fields, Tensors operands);
  // `prepared` is a PackedWeight.
  static Status run(const Fields& fields, Tensors operands, const void* prepared);
  static void cost(const Fields& fields, Tensors operands, Cost& cost);
};

}  // namespace fastrec::engine
