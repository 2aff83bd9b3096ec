// attention: every query sees every key up to its sequence's length.
//
// q [B, H, Lq, D], k and v [B, H, Lk, D] f32, D contiguous; lengths i64 [B], any stride; y f32
// [B, Lq, H, D] contiguous. Lengths stand for a mask that adds a large negative number, so a length
// of 0, where all keys are shifted alike, means all keys.
#include "engine/make_kind.h"
#include "engine/steps/heads.h"
#include "padded_attention/padded_attention.h"
#include "scratch.h"

namespace fastrec::engine {
namespace {

struct Attention {
  static constexpr const char* name = "attention";
  enum { q, k, v, lengths, y };
  static constexpr OperandRule operands[] = {{.name = "q", .strided = true},
                                             {.name = "k", .strided = true},
                                             {.name = "v", .strided = true},
                                             {.name = "lengths", .optional = true},
                                             {.name = "y", .output = true}};
  struct Fields {
    double scale = 1;

    template <class V>
    void each(V& visit) {
      visit("scale", scale);
    }
  };
  static constexpr Traits traits = {.op = "padded_attention",
                                    .shown = "padded_attention",
                                    .users = Users::apart_of_two,
                                    .checked = {lengths, "lengths", k, 2}};

  static Rows rows(const Fields&) { return Rows::queries; }
  static Isa isa(const Fields&, Tensors) { return padded_attention::select().isa; }

  static void check(const StepCheck& check, const Fields&) {
    const Heads heads = check_heads(check, y);
    if (check.has(lengths))
      require(check.is(lengths, {Dtype::i64}) && check.sizes(lengths) == Shape{heads.batch},
              "a length a sequence");
  }

  static Status run(const Fields& fields, Tensors operands, const void*) {
    namespace attention = padded_attention;
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
    const Tensor& given = operands[lengths];
    if (given.data) {
      int64_t* to = scratch<int64_t>(call.batch);
      for (int64_t b = 0; b < call.batch; ++b) {
        const int64_t length = given.as<int64_t>()[b * given.strides[0]];
        to[b] = length == 0 ? call.key_rows : length;
      }
      call.lengths = to;
    }
    const int64_t bad = attention::run(call);
    return bad < 0 ? Status{} : Status{Fault::id_out_of_range, -1, call.lengths[bad]};
  }

  static void cost(const Fields&, Tensors operands, Cost& cost) {
    const int64_t* const q_sizes = operands[q].sizes;
    const int64_t keys = operands[k].sizes[2], all = q_sizes[0] * keys;
    int64_t total = all;
    const Tensor& given = operands[lengths];
    if (given.data) {
      total = 0;
      for (int64_t b = 0; b < q_sizes[0]; ++b) {
        const int64_t length = given.as<int64_t>()[b * given.strides[0]];
        total += length == 0 ? keys : length;
      }
      cost.activation_bytes -= 2 * 4 * q_sizes[1] * q_sizes[3] * (all - total);
    }
    cost.macs = 2 * total * q_sizes[1] * q_sizes[2] * q_sizes[3];
    cost.peak = "fp32";
  }
};

}  // namespace

Kind attention_kind() { return make_kind<Attention>(); }

}  // namespace fastrec::engine
