// Plain loops, any machine: the readable form of every vector kernel.
#include <algorithm>
#include <cmath>
#include <limits>

#include "padded_attention/padded_attention.h"

namespace fastrec::padded_attention {
namespace {

int64_t scratch_floats(int64_t keys, int64_t) { return keys; }

float softmax(float* row, int64_t keys) {
  float highest = -std::numeric_limits<float>::infinity(), sum = 0.0f;
  for (int64_t j = 0; j < keys; ++j) highest = std::max(highest, row[j]);
  for (int64_t j = 0; j < keys; ++j) {
    row[j] = std::exp(row[j] - highest);
    sum += row[j];
  }
  return 1.0f / sum;
}

void part(const Call& call, const Part& part, float* weights) {
  const int64_t dims = call.head_dim;
  const int64_t first = call.first_key(part.batch), keys = call.end_key(part.batch) - first;
  const float* q = call.q.data + part.batch * call.q.batch_stride + part.head * call.q.head_stride;
  const float* k = call.k.data + part.batch * call.k.batch_stride + part.head * call.k.head_stride +
                   first * call.k.row_stride;
  const float* v = call.v.data + part.batch * call.v.batch_stride + part.head * call.v.head_stride +
                   first * call.v.row_stride;
  for (int64_t i = part.begin; i < part.end; ++i) {
    float* out = call.out + ((part.batch * call.query_rows + i) * call.heads + part.head) * dims;
    const float* masked = call.mask.data ? mask_row(call, part, i) : nullptr;
    for (int64_t j = 0; j < keys; ++j) {
      float score = 0.0f;
      for (int64_t d = 0; d < dims; ++d)
        score += q[i * call.q.row_stride + d] * k[j * call.k.row_stride + d];
      weights[j] = score * call.scale;
      if (masked && !call.mask.caps) weights[j] += masked[j];
      if (masked && call.mask.caps && masked[j] < weights[j]) weights[j] = masked[j];
    }
    const bool nothing = keys == 0 || (masked && sees_nothing(weights, keys));
    std::fill(out, out + dims, nothing ? call.nothing : 0.0f);
    if (nothing) continue;
    const float inverse_sum = softmax(weights, keys);
    for (int64_t j = 0; j < keys; ++j)
      for (int64_t d = 0; d < dims; ++d)
        out[d] += weights[j] * inverse_sum * v[j * call.v.row_stride + d];
  }
}

}  // namespace

const Kernel kScalar = {Isa::scalar, scratch_floats, part, softmax};

}  // namespace fastrec::padded_attention
