// separable_projection: a depthwise convolution along the sequence, then a grouped projection.
//
// x [B, L, C] f32, C contiguous; depthwise [C, W], pointwise [G, O, I] and bias [G * O] f32,
// constants, C = G * I, W <= 31; lengths i64 [B] contiguous; y f32 [B, L, G * O] contiguous.
#include "separable_projection/separable_projection.h"

#include "engine/make_kind.h"
#include "engine/steps/groups.h"
#include "engine/steps/heads.h"

namespace fastrec::engine {
namespace {

struct SeparableProjection {
  static constexpr const char* name = "separable_projection";
  enum { x, depthwise, pointwise, bias, lengths, y };
  static constexpr OperandRule operands[] = {{.name = "x", .strided = true},
                                             {.name = "depthwise"},
                                             {.name = "pointwise"},
                                             {.name = "bias", .optional = true},
                                             {.name = "lengths", .optional = true},
                                             {.name = "y", .output = true}};
  struct Fields {
    int64_t before = 0;  // taps that look back, below W

    template <class V>
    void each(V& visit) {
      visit("before", before);
    }
  };
  static constexpr Traits traits = {.op = "separable_projection",
                                    .shown = "separable_projection",
                                    .users = Users::apart_of_two,
                                    .checked = {lengths, "lengths", x, 1}};

  static Rows rows(const Fields&) { return Rows::mixed; }
  static Isa isa(const Fields&, Tensors) { return separable_projection::select().isa; }

  static void check(const StepCheck& check, const Fields& fields) {
    const Shape& sizes = check.sizes(x);
    require(sizes.size() == 3 && check.is(x, {Dtype::f32}), "sequences of float32");
    check.unit(x, 2, "contiguous channels");
    const Matrix in = check.rows(x);
    require(check.sizes(depthwise).size() == 2, "taps of two dimensions");
    const int64_t taps = check.sizes(depthwise)[1].coefficient;
    require(taps > 0 && taps <= separable_projection::kMaxWidth, "1 to 31 taps");
    require(fields.before >= 0 && fields.before < taps, "taps that look back, below all");
    check.table(depthwise, Dtype::f32, {in.width, taps});
    const int64_t outputs = check_groups(check, pointwise, in.width, bias);
    if (check.has(lengths)) check_lengths(check, lengths, sizes[0]);
    check.dense(y, {Dtype::f32});
    check.result(y, {in.rows, outputs}, false);
  }

  static Status run(const Fields& fields, Tensors operands, const void*) {
    namespace separable = separable_projection;
    const Tensor &in = operands[x], &taps = operands[depthwise], &matrices = operands[pointwise];
    const int64_t* const of_each = operands[lengths].as<int64_t>();
    const int64_t bad =
        separable::forward({in.data, separable::Dtype::f32, in.strides[0], in.strides[1]},
                           taps.data, matrices.data, operands[bias].data, operands[y].data,
                           {in.sizes[0], in.sizes[1], in.sizes[2], static_cast<int>(taps.sizes[1]),
                            static_cast<int>(fields.before), of_each},
                           matrices.sizes[0], matrices.sizes[1]);
    return bad < 0 ? Status{} : Status{Fault::id_out_of_range, -1, of_each[bad]};
  }

  // Padding, which the kernel leaves out, counts.
  static void cost(const Fields&, Tensors operands, Cost& cost) {
    cost.macs = operands[x].count() * operands[depthwise].sizes[1] +
                operands[y].count() * operands[pointwise].sizes[2];
    cost.peak = "fp32";
    cost.density = 1.0;
  }
};

}  // namespace

Kind separable_projection_kind() { return make_kind<SeparableProjection>(); }

}  // namespace fastrec::engine
