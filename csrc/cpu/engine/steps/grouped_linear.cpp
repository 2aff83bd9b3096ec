// grouped_linear: each group of channels by its own matrix.
//
// x [.., G * I] f32; weight [G, O, I] f32 and bias [G * O] f32, constants; y f32 [.., G * O]. All
// contiguous.
#include "grouped_linear/grouped_linear.h"

#include "engine/make_kind.h"
#include "engine/steps/groups.h"

namespace fastrec::engine {
namespace {

struct GroupedLinear {
  static constexpr const char* name = "grouped_linear";
  enum { x, weight, bias, y };
  static constexpr OperandRule operands[] = {{.name = "x"},
                                             {.name = "weight"},
                                             {.name = "bias", .optional = true},
                                             {.name = "y", .output = true}};
  struct Fields {
    bool shuffle = false;  // output o of group g is channel o * G + g

    template <class V>
    void each(V& visit) {
      visit("shuffle", shuffle);
    }
  };
  static constexpr Traits traits = {
      .op = "grouped_linear", .shown = "grouped_linear", .users = Users::apart_of_two};

  static Rows rows(const Fields&) { return Rows::last; }
  static Isa isa(const Fields&, Tensors) {
    return grouped_linear::select(grouped_linear::Dtype::f32).isa;
  }

  static void check(const StepCheck& check, const Fields&) {
    const Matrix in = check.rows(x);
    check.dense(x, {Dtype::f32});
    const int64_t outputs = check_groups(check, weight, in.width, bias);
    check.dense(y, {Dtype::f32});
    check.result(y, {in.rows, outputs}, false);
  }

  static Status run(const Fields& fields, Tensors operands, const void*) {
    namespace grouped = grouped_linear;
    const Tensor &in = operands[x], &matrices = operands[weight];
    const int64_t groups = matrices.sizes[0], outputs = matrices.sizes[1],
                  inputs = matrices.sizes[2];
    const auto f32 = grouped::Dtype::f32;
    grouped::forward(
        {in.data, f32, groups * inputs, {inputs, 1}}, matrices.data, operands[bias].data,
        {operands[y].data, f32, groups * outputs,
         fields.shuffle ? grouped::Channels{1, groups} : grouped::Channels{outputs, 1}},
        {in.count() / (groups * inputs), groups, outputs, inputs});
    return {};
  }

  static void cost(const Fields&, Tensors operands, Cost& cost) {
    cost.macs = operands[y].count() * operands[weight].sizes[2];
    cost.peak = "fp32";
    cost.density = 1.0;
  }
};

}  // namespace

Kind grouped_linear_kind() { return make_kind<GroupedLinear>(); }

}  // namespace fastrec::engine
