// causal_attention: query i sees keys 0 .. i; window_sparse_attention with a window over all.
//
// q, k and v [B, H, L, D] f32, D contiguous, D <= 256; y f32 [B, L, H, D] contiguous.
#include "engine/make_kind.h"
#include "engine/steps/heads.h"
#include "engine/steps/resumed_attention.h"
#include "window_sparse_attention/window_sparse_attention.h"

namespace fastrec::engine {
namespace {

struct CausalAttention {
  static constexpr const char* name = "causal_attention";
  enum { q, k, v, y };
  static constexpr OperandRule operands[] = {{.name = "q", .strided = true},
                                             {.name = "k", .strided = true},
                                             {.name = "v", .strided = true},
                                             {.name = "y", .output = true}};
  struct Fields {
    double scale = 1;

    template <class V>
    void each(V& visit) {
      visit("scale", scale);
    }
  };
  static constexpr Traits traits = {
      .op = "window_sparse_attention", .shown = "causal_attention", .users = Users::apart_of_two};

  static Rows rows(const Fields&) { return Rows::mixed; }
  static Isa isa(const Fields&, Tensors) { return window_sparse_attention::select().isa; }

  static void check(const StepCheck& check, const Fields&) {
    const Heads heads = check_heads(check, y);
    check_self_attention(check, heads);
    require(heads.dims.coefficient <= window_sparse_attention::kMaxDims, "heads of at most 256");
  }

  static Status run(const Fields& fields, Tensors operands, const void*) {
    namespace attention = window_sparse_attention;
    const int64_t* const sizes = operands[q].sizes;
    const int64_t batch = sizes[0], heads = sizes[1], rows = sizes[2], dims = sizes[3];
    const attention::Pattern pattern{rows, true, {{}}};
    const auto view = [](const Tensor& t) {
      return attention::View{t.data, t.strides[0], t.strides[1], t.strides[2]};
    };
    attention::Forward call{};
    call.shape = {attention::Dtype::f32, batch, heads, rows, dims, nullptr, nullptr};
    call.pattern = &pattern;
    call.scale = static_cast<float>(fields.scale);
    call.q = view(operands[q]);
    call.k = view(operands[k]);
    call.v = view(operands[v]);
    call.out = {operands[y].data, rows * heads * dims, dims, heads * dims};
    attention::forward(call);
    return {};
  }

  static std::shared_ptr<const void> resumed(const Fields& fields) {
    auto made = std::make_shared<ResumedAttentionFields>();
    made->scale = fields.scale;
    return made;
  }

  // Query i meets i + 1 keys.
  static void cost(const Fields&, Tensors operands, Cost& cost) {
    const int64_t* const sizes = operands[q].sizes;
    cost.macs = sizes[0] * sizes[1] * sizes[3] * sizes[2] * (sizes[2] + 1);
    cost.peak = "fp32";
  }
};

}  // namespace

Kind causal_attention_kind() { return make_kind<CausalAttention>(); }

}  // namespace fastrec::engine
