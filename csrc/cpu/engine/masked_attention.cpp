// masked_attention: attention under a mask of any kind, added to the scores.
//
// operands  q [B, H, Lq, D], k and v [B, H, Lk, D] f32, D contiguous; mask f32 [B, H, Lq, Lk] of
// any
//           strides if integers[0]; result f32 [B, Lq, H, D] contiguous
// integers  whether there is a mask; whether query i sees no key beyond i
// numbers   scale
//
// A row that sees no key (all scores are -inf) gives zeros, as torch's.
#include <algorithm>
#include <cmath>
#include <limits>

#include "engine/steps.h"
#include "parallel.h"
#include "scratch.h"

namespace fastrec::engine {
namespace {

constexpr int64_t kParallelMultiplyAdds = 100'000;

// y[0..n) += a * x[0..n)
void add_scaled(float* y, float a, const float* x, int64_t n) {
  for (int64_t i = 0; i < n; ++i) y[i] += a * x[i];
}

}  // namespace

Status run_masked_attention(const Step& step, const Tensor* operands) {
  const bool has_mask = step.integers[0] != 0, causal = step.integers[1] != 0;
  const Tensor &q = operands[0], &k = operands[1], &v = operands[2];
  const Tensor &mask = operands[3], &out = operands[3 + has_mask];
  const int64_t batch = q.sizes[0], heads = q.sizes[1], queries = q.sizes[2], dims = q.sizes[3];
  const int64_t keys = k.sizes[2];
  const float scale = static_cast<float>(step.numbers[0]);
  const int threads =
      batch * heads * queries * keys * dims < kParallelMultiplyAdds ? 1 : num_threads();

  parallel_for(batch * heads, 1, threads, [&](int64_t begin, int64_t end) {
    float* const across = scratch<float>(keys * (dims + 1));  // keys as columns
    float* const score = across + keys * dims;
    for (int64_t part = begin; part < end; ++part) {
      const int64_t b = part / heads, h = part % heads;
      const float* key = k.as<float>() + b * k.strides[0] + h * k.strides[1];
      const float* value = v.as<float>() + b * v.strides[0] + h * v.strides[1];
      for (int64_t j = 0; j < keys; ++j)
        for (int64_t d = 0; d < dims; ++d) across[d * keys + j] = key[j * k.strides[2] + d];
      for (int64_t i = 0; i < queries; ++i) {
        const float* query = q.as<float>() + b * q.strides[0] + h * q.strides[1] + i * q.strides[2];
        float* result = out.as<float>() + ((b * queries + i) * heads + h) * dims;
        std::fill_n(result, dims, 0.0f);
        const int64_t seen = causal ? std::min(keys, i + 1) : keys;
        std::fill_n(score, seen, 0.0f);
        for (int64_t d = 0; d < dims; ++d)
          add_scaled(score, query[d] * scale, across + d * keys, seen);
        if (has_mask) {
          const float* added =
              mask.as<float>() + b * mask.strides[0] + h * mask.strides[1] + i * mask.strides[2];
          for (int64_t j = 0; j < seen; ++j) score[j] += added[j * mask.strides[3]];
        }
        float top = -std::numeric_limits<float>::infinity();
        for (int64_t j = 0; j < seen; ++j) top = score[j] > top ? score[j] : top;
        if (seen == 0 || (top == -std::numeric_limits<float>::infinity() &&
                          std::none_of(score, score + seen, [](float s) { return s != s; })))
          continue;
        float sum = 0.0f;
        for (int64_t j = 0; j < seen; ++j) sum += score[j] = std::exp(score[j] - top);
        for (int64_t j = 0; j < seen; ++j)
          if (score[j] != 0.0f) add_scaled(result, score[j], value + j * v.strides[2], dims);
        for (int64_t d = 0; d < dims; ++d) result[d] /= sum;
      }
    }
  });
  return {};
}

}  // namespace fastrec::engine
