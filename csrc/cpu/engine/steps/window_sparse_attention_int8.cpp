// window_sparse_attention_int8: window_sparse_attention of 8-bit integers.
//
// q u8 or s8 [B, H, L, D], k u8 or s8, v u8, s8 or f32 [B, H, keys, D], D contiguous, D <= 256;
// lengths i64 [B] contiguous; y f32 or u8 [B, L, H, D] contiguous.
#include "window_sparse_attention_int8/window_sparse_attention_int8.h"

#include <algorithm>

#include "engine/steps/pattern.h"

namespace fastrec::engine {
namespace {

namespace attention = window_sparse_attention_int8;

// Scales whose products with the kernel's integers are finite in fp32.
constexpr double kMaxScale = 1e30;
// Of all heads together: they are laid out for each head when the plan is made.
constexpr int64_t kMaxDistances = 1 << 20;

struct Distances {
  std::vector<int64_t> distances, starts{0};
};

struct WindowSparseAttentionInt8 {
  static constexpr const char* name = "window_sparse_attention_int8";
  enum { q, k, v, lengths, y };
  static constexpr OperandRule operands[] = {{.name = "q", .strided = true},
                                             {.name = "k", .strided = true},
                                             {.name = "v", .strided = true},
                                             {.name = "lengths", .optional = true},
                                             {.name = "y", .output = true}};
  struct Fields {
    double exponent_scale = 1;
    double v_scale = 1;  // of bytes
    double y_scale = 1;
    int64_t q_zero_point = 0, y_zero_point = 0;
    PatternFields pattern;

    template <class V>
    void each(V& visit) {
      visit("exponent_scale", exponent_scale);
      visit("v_scale", v_scale);
      visit("y_scale", y_scale);
      visit("q_zero_point", q_zero_point);
      visit("y_zero_point", y_zero_point);
      pattern.each(visit);
    }
  };
  static constexpr Traits traits = {.op = "window_sparse_attention_int8",
                                    .shown = "window_sparse_attention_int8",
                                    .users = Users::apart_of_two,
                                    .checked = {lengths, "lengths", k, 2}};

  static Rows rows(const Fields& fields) {
    const PatternFields& pattern = fields.pattern;
    return !pattern.causal && pattern.window == kEverything ? Rows::queries : Rows::mixed;
  }
  static Isa isa(const Fields&, Tensors) { return attention::select().isa; }

  static void check(const StepCheck& check, const Fields& fields) {
    const Heads heads = check_heads(check, y, {Dtype::u8, Dtype::s8}, {Dtype::u8, Dtype::s8},
                                    {Dtype::u8, Dtype::s8, Dtype::f32});
    require(heads.heads.is_number(), "a fixed number of heads");
    check.dense(y, {Dtype::f32, Dtype::u8});
    require(check.sizes(y) == Shape{heads.batch, heads.queries, heads.heads, heads.dims},
            "a result [B, L, H, D]");
    require_byte(fields.q_zero_point);
    require_byte(fields.y_zero_point);
    const auto within = [](double scale, double low) { return scale >= low && scale <= kMaxScale; };
    require(within(fields.exponent_scale, 0) && within(fields.v_scale, 0), "scales of 0 or more");
    require(within(fields.y_scale, 1 / kMaxScale), "a scale of the result above 0");
    check_pattern(fields.pattern, heads);
    if (check.has(lengths)) check_lengths(check, lengths, heads.batch);
    // Weighted sums over at most this many keys are int32.
    size_t far = 0;
    for (const auto& list : fields.pattern.distances) far = std::max(far, list.size());
    const double keys = std::min(check.most(check.sizes(k)[2], attention::kMaxKeys + 1),
                                 2.0 * static_cast<double>(fields.pattern.window) + 1);
    require(keys + 2.0 * static_cast<double>(far) <= attention::kMaxKeys,
            "at most 65536 keys a query");
    require(heads.heads.coefficient <= kMaxDistances &&
                heads.heads.coefficient * static_cast<int64_t>(far) <= kMaxDistances,
            "distances of few heads");
  }

  static std::shared_ptr<void> prepare(const Fields& fields, Tensors operands) {
    const Lists& lists = fields.pattern.distances;
    auto made = std::make_shared<Distances>();
    for (int64_t head = 0; head < operands[q].sizes[1]; ++head) {
      const auto& list = lists[lists.size() == 1 ? 0 : static_cast<size_t>(head)];
      made->distances.insert(made->distances.end(), list.begin(), list.end());
      made->starts.push_back(static_cast<int64_t>(made->distances.size()));
    }
    return made;
  }

  static Status run(const Fields& fields, Tensors operands, const void* prepared) {
    const Tensor& out = operands[y];
    const auto rows = [](const Tensor& t) {
      return attention::Rows{t.data, t.strides[0], t.strides[1], t.strides[2]};
    };
    const auto& far = *static_cast<const Distances*>(prepared);
    attention::Call call{};
    call.q = rows(operands[q]);
    call.k = rows(operands[k]);
    call.v = rows(operands[v]);
    call.q_u8 = operands[q].dtype == Dtype::u8;
    call.k_u8 = operands[k].dtype == Dtype::u8;
    call.v_u8 = operands[v].dtype == Dtype::u8;
    call.v_f32 = operands[v].dtype == Dtype::f32;
    call.out_u8 = out.dtype == Dtype::u8;
    call.q_zero_point = static_cast<int32_t>(fields.q_zero_point);
    call.exponent_scale = static_cast<float>(fields.exponent_scale);
    call.v_scale_of_all = static_cast<float>(fields.v_scale);
    call.out = {out.data, out.strides[0], out.strides[2], out.strides[1]};
    call.out_scale = static_cast<float>(fields.y_scale);
    call.out_zero_point = static_cast<int32_t>(fields.y_zero_point);
    call.lengths = operands[lengths].as<int64_t>();
    call.pattern = {fields.pattern.window, fields.pattern.causal, far.distances.data(),
                    far.starts.data()};
    call.batch = operands[q].sizes[0];
    call.heads = operands[q].sizes[1];
    call.length = operands[q].sizes[2];
    call.dims = operands[q].sizes[3];
    call.key_rows = operands[k].sizes[2];
    const int64_t bad = attention::run(call);
    if (bad == attention::kNotFinite) return {Fault::not_a_number};
    return bad < 0 ? Status{} : Status{Fault::id_out_of_range, -1, call.lengths[bad]};
  }

  // Scores of the pattern without padding.
  static void cost(const Fields& fields, Tensors operands, Cost& cost) {
    const int64_t* const sizes = operands[q].sizes;
    const int64_t keys = operands[k].sizes[2];
    cost.macs = 2 * sizes[0] * pattern_scores(fields.pattern, sizes[1], sizes[2], keys) * sizes[3];
    cost.peak = "int8";
  }
};

}  // namespace

Kind window_sparse_attention_int8_kind() { return make_kind<WindowSparseAttentionInt8>(); }

}  // namespace fastrec::engine
