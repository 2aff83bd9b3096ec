// resumed_attention: causal attention of new events, which see those before them and each other.
//
// q, k and v of the new events [B, H, L, D] f32, D contiguous, D <= 256; past_k and past_v, those
// of the past, [B, H, P, D] f32, D contiguous; past: how many rows of the past count, i64 [B],
// 0..P; y f32 [B, L, H, D] contiguous.
//
// New event i of user b stands at position past[b] + i. New events are few beside the past: a
// query's keys are gathered, so that all of them are seen, and what is read follows the pattern.
#include "engine/steps/resumed_attention.h"

#include <algorithm>
#include <cstring>
#include <vector>

#include "engine/check.h"
#include "engine/steps/pattern.h"
#include "padded_attention/padded_attention.h"
#include "scratch.h"
#include "window_sparse_attention/window_sparse_attention.h"

namespace fastrec::engine {
namespace {

namespace attention = padded_attention;
using Pattern = window_sparse_attention::Pattern;

// Rows of one head: those of the past, then the new ones.
struct Head {
  const float *past, *now;
  int64_t past_stride, now_stride, past_rows;

  const float* row(int64_t position) const {
    return position < past_rows ? past + position * past_stride
                                : now + (position - past_rows) * now_stride;
  }
};

Head head_of(const Tensor& past, const Tensor& now, int64_t b, int64_t h, int64_t past_rows) {
  const auto at = [&](const Tensor& t) {
    return t.as<float>() + b * t.strides[0] + h * t.strides[1];
  };
  return {at(past), at(now), past.strides[2], now.strides[2], past_rows};
}

// The positions that `query` sees, to `to`; how many.
int64_t seen(const Pattern* pattern, int64_t head, int64_t query, int64_t* to) {
  int64_t count = 0;
  if (!pattern) {
    for (int64_t j = 0; j <= query; ++j) to[count++] = j;
    return count;
  }
  const auto far = pattern->of_head(head);
  for (size_t n = far.size(); n-- > 0;)
    if (far[n] <= query) to[count++] = query - far[n];
  for (int64_t j = std::max<int64_t>(0, query - pattern->window); j <= query; ++j) to[count++] = j;
  return count;
}

struct ResumedAttention {
  static constexpr const char* name = "resumed_attention";
  enum { q, k, v, past_k, past_v, past, y };
  static constexpr OperandRule operands[] = {
      {.name = "q", .strided = true},      {.name = "k", .strided = true},
      {.name = "v", .strided = true},      {.name = "past_k", .strided = true},
      {.name = "past_v", .strided = true}, {.name = "past"},
      {.name = "y", .output = true}};
  using Fields = ResumedAttentionFields;
  static constexpr Traits traits = {.op = "padded_attention",
                                    .shown = "resumed_attention",
                                    .users = Users::mixed,
                                    .checked = {past, "lengths", past_k, 2}};

  static Rows rows(const Fields&) { return Rows::mixed; }
  static Isa isa(const Fields&, Tensors) { return attention::select().isa; }

  static void check(const StepCheck& check, const Fields& fields) {
    const Heads heads = check_heads(check, y);
    check_self_attention(check, heads);
    check_pattern(pattern_of(fields), heads);
    const Shape& sizes = check.sizes(past_k);
    require(sizes.size() == 4 && sizes == check.sizes(past_v) &&
                sizes == Shape{heads.batch, heads.heads, sizes[2], heads.dims},
            "a past like the new events");
    for (const int o : {past_k, past_v}) {
      require(check.is(o, {Dtype::f32}), "a past of float32");
      check.unit(o, 3, "contiguous heads");
      require(check.view(o).strides[2].coefficient > 0, "a past of rows of its own");
    }
    check_lengths(check, past, heads.batch);
  }

  static std::shared_ptr<void> prepare(const Fields& fields, Tensors) {
    if (!fields.has_pattern) return nullptr;
    return std::make_shared<Pattern>(Pattern{fields.window, true, fields.distances});
  }

  static Status run(const Fields& fields, Tensors operands, const void* prepared) {
    using Of = ResumedAttention;
    const Tensor &q = operands[Of::q], &k = operands[Of::k], &v = operands[Of::v];
    const Tensor &past_k = operands[Of::past_k], &past_v = operands[Of::past_v],
                 &past = operands[Of::past];
    const int64_t batch = q.sizes[0], heads = q.sizes[1], rows = q.sizes[2], dims = q.sizes[3];
    const auto* pattern = static_cast<const Pattern*>(prepared);
    for (int64_t b = 0; b < batch; ++b) {
      const int64_t length = past.as<int64_t>()[b * past.strides[0]];
      if (length < 0 || length > past_k.sizes[2]) return {Fault::id_out_of_range, -1, length};
    }
    const attention::Kernel& kernel = attention::select();
    float* const out = operands[y].as<float>();
    const int64_t most = past_k.sizes[2] + rows;
    const int64_t position_lines = (most + 7) / 8;  // of a cache line
    const int64_t own_floats = kernel.scratch_floats(most, dims);
    for (int64_t pair = 0; pair < batch * heads; ++pair) {
      const int64_t b = pair / heads, h = pair % heads;
      const int64_t length = past.as<int64_t>()[b * past.strides[0]];
      const Head keys = head_of(past_k, k, b, h, length), values = head_of(past_v, v, b, h, length);
      auto* const positions =
          scratch<int64_t>(position_lines * 8 + (own_floats + 2 * most * dims + 1) / 2);
      float* const memory = reinterpret_cast<float*>(positions + position_lines * 8);
      float* const key_rows = memory + own_floats;
      float* const value_rows = key_rows + most * dims;
      for (int64_t i = 0; i < rows; ++i) {
        const int64_t count = seen(pattern, h, length + i, positions);
        // Without a pattern the next query sees the same rows and one more.
        for (int64_t n = pattern || i == 0 ? 0 : count - 1; n < count; ++n) {
          std::memcpy(key_rows + n * dims, keys.row(positions[n]), dims * sizeof(float));
          std::memcpy(value_rows + n * dims, values.row(positions[n]), dims * sizeof(float));
        }
        attention::Call call{};
        call.q = {q.as<float>() + b * q.strides[0] + h * q.strides[1] + i * q.strides[2], 0, 0, 0};
        call.k = {key_rows, 0, 0, dims};
        call.v = {value_rows, 0, 0, dims};
        call.out = out + ((b * rows + i) * heads + h) * dims;
        call.batch = call.heads = call.query_rows = 1;
        call.key_rows = count;
        call.head_dim = dims;
        call.scale = static_cast<float>(fields.scale);
        kernel.part(call, {0, 0, 0, 1}, memory);
      }
    }
    return {};
  }

  // Nothing is known of the arithmetic: it depends on how much of the past counts.
  static void cost(const Fields&, Tensors, Cost&) {}

 private:
  static PatternFields pattern_of(const Fields& fields) {
    if (!fields.has_pattern) return {true, 0, {{}}};
    return {true, fields.window, fields.distances};
  }
};

}  // namespace

Kind resumed_attention_kind() { return make_kind<ResumedAttention>(); }

}  // namespace fastrec::engine
