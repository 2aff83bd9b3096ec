#include "engine/steps.h"

namespace fastrec::engine {

const Kind* find_kind(const std::string& name) {
  static constexpr Kind kKinds[] = {
      {"attention", run_attention, nullptr},
      {"causal_attention", run_causal_attention, nullptr},
      {"masked_attention", run_masked_attention, nullptr},
      {"grouped_linear", run_grouped_linear, nullptr},
      {"matmul", run_matmul, nullptr},
      {"resumed_attention", run_resumed_attention, prepare_resumed_attention},
      {"separable_projection", run_separable_projection, nullptr},
      {"window_sparse_attention", run_window_sparse_attention, prepare_window_sparse_attention},
      {"window_sparse_attention_int8", run_window_sparse_attention_int8,
       prepare_window_sparse_attention_int8},
      {"cumsum", run_cumsum, nullptr},
      {"quantize", run_quantize, nullptr},
      {"reduce", run_reduce, nullptr},
      {"softmax", run_softmax, nullptr},
      {"gather", run_gather, nullptr},
      {"layer_norm", run_layer_norm, nullptr},
      {"linear", run_linear, prepare_linear},
      {"linear_bf16", run_linear, prepare_linear_bf16},
      {"linear_int8", run_linear_int8, prepare_linear_int8},
      {"map", run_map, check_map},
  };
  for (const Kind& kind : kKinds)
    if (name == kind.name) return &kind;
  return nullptr;
}

}  // namespace fastrec::engine
