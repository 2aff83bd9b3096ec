// softmax: along the last dimension.
//
// x f32 [.., N]; y f32 of its size; both contiguous.
#include <algorithm>

#include "engine/make_kind.h"
#include "engine/steps/middle.h"
#include "padded_attention/padded_attention.h"

namespace fastrec::engine {
namespace {

struct Softmax {
  static constexpr const char* name = "softmax";
  enum { x, y };
  static constexpr OperandRule operands[] = {{.name = "x"}, {.name = "y", .output = true}};
  using Fields = NoFields;
  static constexpr Traits traits = {.op = "", .shown = "softmax", .users = Users::apart_of_two};

  static Rows rows(const Fields&) { return Rows::mixed; }

  static void check(const StepCheck& check, const Fields&) {
    require(!check.sizes(x).empty(), "rows of numbers");
    check.dense(x, {Dtype::f32});
    check.dense(y, {Dtype::f32});
    check.elements(y, product(check.sizes(x)), "a result of the operand's size");
  }

  static Status run(const Fields&, Tensors operands, const void*) {
    const Tensor& x = operands[Softmax::x];
    const int64_t width = x.sizes[x.dims - 1];
    if (width == 0) return {};
    const auto softmax = padded_attention::select().softmax;
    parallel_for(x.count() / width, 1, threads_for(x), [&](int64_t begin, int64_t end) {
      for (int64_t r = begin; r < end; ++r) {
        float* const to = operands[y].as<float>() + r * width;
        std::copy_n(x.as<float>() + r * width, width, to);
        const float inverse_sum = softmax(to, width);
        for (int64_t i = 0; i < width; ++i) to[i] *= inverse_sum;
      }
    });
    return {};
  }

  static void cost(const Fields&, Tensors, Cost& cost) { cost.peak = ""; }
};

}  // namespace

Kind softmax_kind() { return make_kind<Softmax>(); }

}  // namespace fastrec::engine
