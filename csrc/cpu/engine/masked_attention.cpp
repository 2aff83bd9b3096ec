// masked_attention: attention under a mask of any kind, added to the scores; padded_attention.
//
// operands  q [B, H, Lq, D], k and v [B, H, Lk, D] f32, D contiguous; mask f32 [B, H, Lq, Lk], Lk
//           contiguous, other strides may be 0, if integers[0]; result f32 [B, Lq, H, D] contiguous
// integers  whether there is a mask; whether query i sees no key beyond i; whether the mask caps
// the
//           scores instead of being added; whether a row that sees no key gives NaN
// numbers   scale
//
// A row that sees no key (all scores are -inf) gives zeros, as torch's function does, or NaN, as a
// softmax does. Where the mask depends on
// the keys alone, those that it hides at either end (padding in front or behind) cost nothing, and
// may hold anything; if it does nothing else, it is not read again.
#include <algorithm>
#include <limits>

#include "engine/steps.h"
#include "padded_attention/padded_attention.h"
#include "scratch.h"

namespace fastrec::engine {
namespace {

namespace attention = padded_attention;

// Scratch of a type of its own: the kernel's is in use meanwhile.
struct Added {
  float value;
};

// So far below the others a key's weight is 0, as the front end has it that finds lengths.
constexpr float kHidden = -1e4f;

// Starts and lengths of the keys that a mask of the keys alone leaves; whether it is needed still.
bool trim(const Tensor& mask, int64_t batch, int64_t keys, bool caps, int64_t* starts,
          int64_t* lengths) {
  constexpr float kInfinity = std::numeric_limits<float>::infinity();
  const float neutral = caps ? kInfinity : 0.0f;
  bool needed = false;
  for (int64_t b = 0; b < batch; ++b) {
    const float* row = mask.as<float>() + b * mask.strides[0];
    float top = -kInfinity;
    for (int64_t j = 0; j < keys; ++j) top = std::max(top, row[j]);
    const float hidden = std::min(top, 0.0f) + kHidden;
    int64_t first = 0, end = keys;
    while (first < end && row[first] <= hidden) ++first;
    while (first < end && row[end - 1] <= hidden) --end;
    for (int64_t j = first; j < end && !needed; ++j) needed = row[j] != neutral;
    starts[b] = first;
    lengths[b] = end;
  }
  return needed;
}

// mask (or zeros), and -inf beyond the diagonal: [B or 1][H or 1][Lq][Lk].
attention::Mask with_causal(const Tensor* mask, int64_t batch, int64_t heads, int64_t queries,
                            int64_t keys) {
  if (!mask || mask->strides[0] == 0) batch = 1;
  if (!mask || mask->strides[1] == 0) heads = 1;
  Added* const memory = scratch<Added>(batch * heads * queries * keys);
  Added* to = memory;
  for (int64_t b = 0; b < batch; ++b)
    for (int64_t h = 0; h < heads; ++h)
      for (int64_t i = 0; i < queries; ++i)
        for (int64_t j = 0; j < keys; ++j, ++to) {
          const float added = mask ? mask->as<float>()[b * mask->strides[0] + h * mask->strides[1] +
                                                       i * mask->strides[2] + j]
                                   : 0.0f;
          to->value = j <= i ? added : -std::numeric_limits<float>::infinity();
        }
  const int64_t head = queries * keys;
  return {&memory->value, batch == 1 ? 0 : heads * head, heads == 1 ? 0 : head, keys, false};
}

}  // namespace

Status run_masked_attention(const Step& step, const Tensor* operands) {
  const bool has_mask = step.integers[0] != 0, causal = step.integers[1] != 0;
  const bool caps = step.integers[2] != 0;
  const Tensor &q = operands[0], &k = operands[1], &v = operands[2];
  const Tensor* const mask = has_mask ? &operands[3] : nullptr;
  const auto rows = [](const Tensor& t) {
    return attention::Rows{t.as<float>(), t.strides[0], t.strides[1], t.strides[2]};
  };
  attention::Call call{};
  call.q = rows(q);
  call.k = rows(k);
  call.v = rows(v);
  call.out = operands[3 + has_mask].as<float>();
  call.batch = q.sizes[0];
  call.heads = q.sizes[1];
  call.query_rows = q.sizes[2];
  call.head_dim = q.sizes[3];
  call.key_rows = k.sizes[2];
  call.scale = static_cast<float>(step.numbers[0]);
  if (step.integers[3]) call.nothing = std::numeric_limits<float>::quiet_NaN();
  if (causal) {
    call.mask = with_causal(mask, call.batch, call.heads, call.query_rows, call.key_rows);
  } else if (mask) {
    const bool of_keys = (mask->strides[1] == 0 || call.heads == 1) &&
                         (mask->strides[2] == 0 || call.query_rows == 1);
    bool needed = true;
    if (of_keys) {
      int64_t* const starts = scratch<int64_t>(2 * call.batch);
      needed = trim(*mask, call.batch, call.key_rows, caps, starts, starts + call.batch);
      call.starts = starts;
      call.lengths = starts + call.batch;
    }
    if (needed)
      call.mask = {mask->as<float>(), mask->strides[0], mask->strides[1], mask->strides[2], caps};
  }
  attention::run(call);
  return {};
}

}  // namespace fastrec::engine
