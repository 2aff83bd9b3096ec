// quantize: activation_quantize of floats.
//
// x f32, y u8 of as many elements, both contiguous.
#include "activation_quantize/activation_quantize.h"
#include "engine/check.h"
#include "engine/make_kind.h"

namespace fastrec::engine {
namespace {

struct Quantize {
  static constexpr const char* name = "quantize";
  enum { x, y };
  static constexpr OperandRule operands[] = {{.name = "x"}, {.name = "y", .output = true}};
  struct Fields {
    double scale = 1;
    int64_t zero_point = 0;

    template <class V>
    void each(V& visit) {
      visit("scale", scale);
      visit("zero_point", zero_point);
    }
  };
  static constexpr Traits traits = {
      .op = "activation_quantize", .shown = "quantize", .users = Users::apart};

  static Rows rows(const Fields&) { return Rows::mixed; }
  static Isa isa(const Fields&, Tensors) { return activation_quantize::select().isa; }

  static void check(const StepCheck& check, const Fields& fields) {
    require_byte(fields.zero_point);
    require_scale(fields.scale);
    check.dense(x, {Dtype::f32});
    check.dense(y, {Dtype::u8});
    check.elements(y, product(check.sizes(x)), "as many elements");
  }

  static Status run(const Fields& fields, Tensors operands, const void*) {
    namespace op = activation_quantize;
    op::Call call{};
    call.x = operands[x].data;
    call.x_type = op::Input::f32;
    call.y = operands[y].data;
    call.y_type = op::Output::u8;
    call.quantisation = {static_cast<float>(fields.scale), static_cast<int32_t>(fields.zero_point)};
    call.count = operands[x].count();
    return op::run(call) ? Status{} : Status{Fault::not_a_number};
  }

  static void cost(const Fields&, Tensors, Cost& cost) { cost.peak = ""; }
};

}  // namespace

Kind quantize_kind() { return make_kind<Quantize>(); }

}  // namespace fastrec::engine
