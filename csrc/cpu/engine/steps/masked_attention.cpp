// masked_attention: attention under a mask of any kind, added to the scores; padded_attention.
//
// q [B, H, Lq, D], k and v [B, H, Lk, D] f32, D contiguous; mask f32 [B, H, Lq, Lk], Lk contiguous,
// other strides may be 0; y f32 [B, Lq, H, D] contiguous.
//
// A row that sees no key (all scores are -inf) gives zeros, as torch's function does, or NaN, as a
// softmax does. Where the mask depends on the keys alone, those that it hides at either end
// (padding in front or behind) cost nothing, and may hold anything; if it does nothing else, it is
// not read again.
#include <algorithm>
#include <limits>

#include "engine/make_kind.h"
#include "engine/steps/heads.h"
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
    const float limit = std::min(top, 0.0f) + kHidden;
    // The largest is not hidden by rounding (the lowest float less 10,000 is itself), but by -inf.
    const auto hidden = [&](float value) {
      return value <= limit && (value < top || value == -kInfinity);
    };
    int64_t first = 0, end = keys;
    while (first < end && hidden(row[first])) ++first;
    while (first < end && hidden(row[end - 1])) --end;
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

struct MaskedAttention {
  static constexpr const char* name = "masked_attention";
  enum { q, k, v, mask, y };
  static constexpr OperandRule operands[] = {{.name = "q", .strided = true},
                                             {.name = "k", .strided = true},
                                             {.name = "v", .strided = true},
                                             {.name = "mask", .optional = true, .strided = true},
                                             {.name = "y", .output = true}};
  struct Fields {
    double scale = 1;
    bool causal = false;        // query i sees no key beyond i
    bool caps = false;          // the mask is the scores' upper bound instead of being added
    bool empty_is_nan = false;  // a row that sees no key gives NaN

    template <class V>
    void each(V& visit) {
      visit("scale", scale);
      visit("causal", causal);
      visit("caps", caps);
      visit("empty_is_nan", empty_is_nan);
    }
  };
  static constexpr Traits traits = {
      .op = "padded_attention", .shown = "masked_attention", .users = Users::apart_of_two};

  static Rows rows(const Fields&) { return Rows::mixed; }
  static Isa isa(const Fields&, Tensors) { return attention::select().isa; }

  static void check(const StepCheck& check, const Fields& fields) {
    require(!(fields.causal && fields.caps), "a causal mask, or one that caps");
    const Heads heads = check_heads(check, y);
    if (!check.has(mask)) return;
    const Extent& keys = check.sizes(k)[2];
    require(check.is(mask, {Dtype::f32}) &&
                check.sizes(mask) == Shape{heads.batch, heads.heads, heads.queries, keys},
            "a float32 mask of a number a score");
    check.unit(mask, 3, "contiguous rows of the mask");
  }

  static Status run(const Fields& fields, Tensors operands, const void*) {
    const Tensor* const masking = operands[mask].data ? &operands[mask] : nullptr;
    const auto rows = [](const Tensor& t) {
      return attention::Rows{t.as<float>(), t.strides[0], t.strides[1], t.strides[2]};
    };
    attention::Call call{};
    call.q = rows(operands[q]);
    call.k = rows(operands[k]);
    call.v = rows(operands[v]);
    call.out = operands[y].as<float>();
    call.batch = operands[q].sizes[0];
    call.heads = operands[q].sizes[1];
    call.query_rows = operands[q].sizes[2];
    call.head_dim = operands[q].sizes[3];
    call.key_rows = operands[k].sizes[2];
    call.scale = static_cast<float>(fields.scale);
    if (fields.empty_is_nan) call.nothing = std::numeric_limits<float>::quiet_NaN();
    if (fields.causal) {
      call.mask = with_causal(masking, call.batch, call.heads, call.query_rows, call.key_rows);
    } else if (masking) {
      const bool of_keys = (masking->strides[1] == 0 || call.heads == 1) &&
                           (masking->strides[2] == 0 || call.query_rows == 1);
      bool needed = true;
      if (of_keys) {
        int64_t* const starts = scratch<int64_t>(2 * call.batch);
        needed =
            trim(*masking, call.batch, call.key_rows, fields.caps, starts, starts + call.batch);
        call.starts = starts;
        call.lengths = starts + call.batch;
      }
      if (needed)
        call.mask = {masking->as<float>(), masking->strides[0], masking->strides[1],
                     masking->strides[2], fields.caps};
    }
    attention::run(call);
    return {};
  }

  // Which scores the mask hides is known at a call alone: all count but those a causal one leaves
  // out.
  static void cost(const Fields& fields, Tensors operands, Cost& cost) {
    const int64_t* const sizes = operands[q].sizes;
    const int64_t rows = sizes[2], keys = operands[k].sizes[2];
    int64_t scores = rows * keys;
    if (fields.causal) {
      const int64_t rising = std::min(rows, keys);  // query i sees i + 1 keys, then all
      scores = rising * (rising + 1) / 2 + (rows - rising) * keys;
    }
    cost.macs = 2 * sizes[0] * sizes[1] * sizes[3] * scores;
    cost.peak = "fp32";
  }
};

}  // namespace

Kind masked_attention_kind() { return make_kind<MaskedAttention>(); }

}  // namespace fastrec::engine
