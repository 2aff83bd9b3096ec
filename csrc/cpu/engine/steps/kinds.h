// All kinds of steps, one a line. X(name): steps/<name>.cpp defines `Kind <name>_kind()`.
#pragma once

#define FASTREC_STEP_KINDS(X) \
  X(argsort)                  \
  X(attention)                \
  X(causal_attention)         \
  X(cumsum)                   \
  X(gather)                   \
  X(grouped_linear)           \
  X(layer_norm)               \
  X(linear)                   \
  X(linear_bf16)              \
  X(linear_int8)              \
  X(map)                      \
  X(masked_attention)         \
  X(matmul)                   \
  X(pointwise_attention)      \
  X(quantize)                 \
  X(recurrent)                \
  X(reduce)                   \
  X(resumed_attention)        \
  X(scatter)                  \
  X(separable_projection)     \
  X(softmax)                  \
  X(take)                     \
  X(window_linear)            \
  X(window_sparse_attention)  \
  X(window_sparse_attention_int8)
