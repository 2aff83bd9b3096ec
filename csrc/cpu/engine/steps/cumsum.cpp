// cumsum: the sums up to each position of the middle dimension.
//
// x f32 or i64 [A, N, C]; y of its dtype and size; both contiguous.
#include "engine/make_kind.h"
#include "engine/steps/middle.h"

namespace fastrec::engine {
namespace {

struct Cumsum {
  static constexpr const char* name = "cumsum";
  enum { x, y };
  static constexpr OperandRule operands[] = {{.name = "x"}, {.name = "y", .output = true}};
  using Fields = NoFields;
  static constexpr Traits traits = {.op = "", .shown = "cumsum", .users = Users::apart_of_two};

  static Rows rows(const Fields&) { return Rows::mixed; }

  static void check(const StepCheck& check, const Fields&) {
    check_middle(check, x, y, true);
    check.elements(y, product(check.sizes(x)), "a result of the operand's size");
  }

  static Status run(const Fields&, Tensors operands, const void*) {
    const Tensor &x = operands[Cumsum::x], &y = operands[Cumsum::y];
    const int64_t count = x.sizes[1], width = x.sizes[2];
    parallel_for(x.sizes[0], 1, threads_for(x), [&](int64_t begin, int64_t end) {
      for (int64_t line = begin * width; line < end * width; ++line) {
        int64_t at = line / width * count * width + line % width;
        double total = 0;
        uint64_t integers = 0;
        for (int64_t n = 0; n < count; ++n, at += width) {
          if (x.dtype == Dtype::f32)
            y.as<float>()[at] = static_cast<float>(total += x.as<float>()[at]);
          else
            y.as<int64_t>()[at] =
                static_cast<int64_t>(integers += static_cast<uint64_t>(x.as<int64_t>()[at]));
        }
      }
    });
    return {};
  }

  static void cost(const Fields&, Tensors, Cost& cost) { cost.peak = ""; }
};

}  // namespace

Kind cumsum_kind() { return make_kind<Cumsum>(); }

}  // namespace fastrec::engine
