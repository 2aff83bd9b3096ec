// The kinds of steps; what each takes is written above its function's definition.
#pragma once

#include "engine/plan.h"

namespace fastrec::engine {

Status run_map(const Step& step, const Tensor* operands);
// A `Prepare` that keeps nothing; throws std::invalid_argument for a program that `run_map` must
// not see.
std::shared_ptr<void> check_map(const Step& step, const Tensor* operands);
Status run_gather(const Step& step, const Tensor* operands);
Status run_layer_norm(const Step& step, const Tensor* operands);
Status run_linear(const Step& step, const Tensor* operands);
std::shared_ptr<void> prepare_linear(const Step& step, const Tensor* operands);
std::shared_ptr<void> prepare_linear_bf16(const Step& step, const Tensor* operands);
Status run_linear_int8(const Step& step, const Tensor* operands);
std::shared_ptr<void> prepare_linear_int8(const Step& step, const Tensor* operands);
Status run_causal_attention(const Step& step, const Tensor* operands);
Status run_masked_attention(const Step& step, const Tensor* operands);
Status run_grouped_linear(const Step& step, const Tensor* operands);
Status run_matmul(const Step& step, const Tensor* operands);
Status run_resumed_attention(const Step& step, const Tensor* operands);
std::shared_ptr<void> prepare_resumed_attention(const Step& step, const Tensor* operands);
Status run_separable_projection(const Step& step, const Tensor* operands);
Status run_window_sparse_attention(const Step& step, const Tensor* operands);
std::shared_ptr<void> prepare_window_sparse_attention(const Step& step, const Tensor* operands);
Status run_window_sparse_attention_int8(const Step& step, const Tensor* operands);
std::shared_ptr<void> prepare_window_sparse_attention_int8(const Step& step,
                                                           const Tensor* operands);
Status run_cumsum(const Step& step, const Tensor* operands);
Status run_quantize(const Step& step, const Tensor* operands);
Status run_reduce(const Step& step, const Tensor* operands);
Status run_softmax(const Step& step, const Tensor* operands);
Status run_attention(const Step& step, const Tensor* operands);

}  // namespace fastrec::engine
