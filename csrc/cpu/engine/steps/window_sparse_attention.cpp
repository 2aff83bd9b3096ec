// window_sparse_attention: query i sees the keys of its window and those at given distances.
//
// q, k and v [B, H, L, D] f32, D contiguous, D <= 256; lengths i64 [B] contiguous; y f32
// [B, L, H, D] contiguous.
#include "window_sparse_attention/window_sparse_attention.h"

#include "engine/steps/pattern.h"
#include "engine/steps/resumed_attention.h"

namespace fastrec::engine {
namespace {

namespace attention = window_sparse_attention;

struct WindowSparseAttention {
  static constexpr const char* name = "window_sparse_attention";
  enum { q, k, v, lengths, y };
  static constexpr OperandRule operands[] = {{.name = "q", .strided = true},
                                             {.name = "k", .strided = true},
                                             {.name = "v", .strided = true},
                                             {.name = "lengths", .optional = true},
                                             {.name = "y", .output = true}};
  struct Fields {
    double scale = 1;
    PatternFields pattern;

    template <class V>
    void each(V& visit) {
      visit("scale", scale);
      pattern.each(visit);
    }
  };
  static constexpr Traits traits = {.op = "window_sparse_attention",
                                    .shown = "window_sparse_attention",
                                    .users = Users::apart_of_two,
                                    .checked = {lengths, "lengths", k, 2}};

  static Rows rows(const Fields&) { return Rows::mixed; }
  static Isa isa(const Fields&, Tensors) { return attention::select().isa; }

  static void check(const StepCheck& check, const Fields& fields) {
    const Heads heads = check_heads(check, y);
    check_self_attention(check, heads);
    check_pattern(fields.pattern, heads);
    if (check.has(lengths)) check_lengths(check, lengths, heads.batch);
  }

  static std::shared_ptr<void> prepare(const Fields& fields, Tensors) {
    const PatternFields& from = fields.pattern;
    return std::make_shared<attention::Pattern>(
        attention::Pattern{from.window, from.causal, from.distances});
  }

  static Status run(const Fields& fields, Tensors operands, const void* prepared) {
    const int64_t* const sizes = operands[q].sizes;
    const int64_t batch = sizes[0], heads = sizes[1], rows = sizes[2], dims = sizes[3];
    const auto view = [](const Tensor& t) {
      return attention::View{t.data, t.strides[0], t.strides[1], t.strides[2]};
    };
    const int64_t* const of_each = operands[lengths].as<int64_t>();
    attention::Forward call{};
    call.shape = {attention::Dtype::f32, batch, heads, rows, dims, of_each, nullptr};
    call.pattern = static_cast<const attention::Pattern*>(prepared);
    call.scale = static_cast<float>(fields.scale);
    call.q = view(operands[q]);
    call.k = view(operands[k]);
    call.v = view(operands[v]);
    call.out = {operands[y].data, rows * heads * dims, dims, heads * dims};
    const int64_t bad = attention::forward(call);
    return bad < 0 ? Status{} : Status{Fault::id_out_of_range, -1, of_each[bad]};
  }

  static std::shared_ptr<const void> resumed(const Fields& fields) {
    if (!fields.pattern.causal) return nullptr;
    return std::make_shared<ResumedAttentionFields>(ResumedAttentionFields{
        fields.scale, true, fields.pattern.window, fields.pattern.distances});
  }

  // Scores of the pattern without padding.
  static void cost(const Fields& fields, Tensors operands, Cost& cost) {
    const int64_t* const sizes = operands[q].sizes;
    const int64_t keys = operands[k].sizes[2];
    cost.macs = 2 * sizes[0] * pattern_scores(fields.pattern, sizes[1], sizes[2], keys) * sizes[3];
    cost.peak = "fp32";
  }
};

}  // namespace

Kind window_sparse_attention_kind() { return make_kind<WindowSparseAttention>(); }

}  // namespace fastrec::engine
