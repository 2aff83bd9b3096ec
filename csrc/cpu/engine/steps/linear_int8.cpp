// linear_int8: sparse_int8_linear.
//
// x [.., K] f32 or u8, contiguous or in tiles; values, group_index, panel_start, w_scale, w_sum and
// bias: the packed weight, constants; y [.., N] f32 or u8, contiguous or in tiles.
//
// In tiles, a buffer's last dimension has 2 * (N rounded up to a chunk) bytes: what the ISA with
// the widest elements takes. The values that depend on the weight alone are folded when the plan is
// made.
#include <algorithm>
#include <cmath>

#include "activation_quantize/activation_quantize.h"
#include "engine/check.h"
#include "engine/make_kind.h"
#include "sparse_int8_linear/sparse_int8_linear.h"

namespace fastrec::engine {
namespace {

namespace linear = sparse_int8_linear;

struct LinearInt8 {
  static constexpr const char* name = "linear_int8";
  enum { x, values, group_index, panel_start, w_scale, w_sum, bias, y };
  static constexpr OperandRule operands[] = {{.name = "x"},
                                             {.name = "values"},
                                             {.name = "group_index"},
                                             {.name = "panel_start"},
                                             {.name = "w_scale"},
                                             {.name = "w_sum"},
                                             {.name = "bias", .optional = true},
                                             {.name = "y", .output = true}};
  struct Fields {
    int64_t outputs = 0, inputs = 0;  // N, K
    double x_scale = 1;
    int64_t x_zero_point = 0;
    linear::Activation activation = linear::Activation::none;
    double y_scale = 1;
    int64_t y_zero_point = 0;
    bool x_tiles = false, y_tiles = false;

    template <class V>
    void each(V& visit) {
      visit("outputs", outputs);
      visit("inputs", inputs);
      visit("x_scale", x_scale);
      visit("x_zero_point", x_zero_point);
      visit("activation", activation, activation_quantize::kActivationNames);
      visit("y_scale", y_scale);
      visit("y_zero_point", y_zero_point);
      visit("x_tiles", x_tiles);
      visit("y_tiles", y_tiles);
    }
  };
  static constexpr Traits traits = {
      .op = "sparse_int8_linear", .shown = "sparse_int8_linear", .users = Users::apart_of_two};

  static Rows rows(const Fields&) { return Rows::last; }
  static Isa isa(const Fields&, Tensors) { return linear::select().isa; }
  static uint32_t tiled(const Fields& fields) {
    return (fields.x_tiles ? 1u << x : 0) | (fields.y_tiles ? 1u << y : 0);
  }

  static void check(const StepCheck& check, const Fields& fields) {
    const int64_t outputs = fields.outputs, inputs = fields.inputs;
    require_byte(fields.x_zero_point);
    require_byte(fields.y_zero_point);
    require_scale(fields.x_scale);
    require_scale(fields.y_scale);
    require(outputs > 0 && outputs <= INT32_MAX && inputs > 0 && inputs <= linear::kMaxInputs,
            "sizes that sums of 32 bits allow");
    const Matrix in = check.rows(x);
    require(in.width == inputs, "as many inputs as the weight has");
    check.dense(x, {Dtype::f32, Dtype::u8});
    if (fields.x_tiles) check.tiles(x, in);
    check_weight(check, outputs, inputs);
    check.table(w_scale, Dtype::f32, {outputs});
    check.table(w_sum, Dtype::i32, {outputs});
    if (check.has(bias)) check.table(bias, Dtype::f32, {outputs});
    check.result(y, {in.rows, outputs}, fields.y_tiles);
  }

  static std::shared_ptr<void> prepare(const Fields& fields, Tensors operands) {
    return std::make_shared<linear::Folding>(weight_of(fields, operands), x_quantisation(fields));
  }

  static Status run(const Fields& fields, Tensors operands, const void* prepared) {
    linear::Call call{};
    call.weight = weight_of(fields, operands);
    call.folded = static_cast<const linear::Folding*>(prepared)->folded();
    call.x = operands[x].data;
    call.x_dtype = dtype_of(operands[x], fields.x_tiles);
    call.x_quantisation = x_quantisation(fields);
    call.rows = operands[x].count() / fields.inputs;
    call.activation = fields.activation;
    call.y = operands[y].data;
    call.y_dtype = dtype_of(operands[y], fields.y_tiles);
    call.y_quantisation = {static_cast<float>(fields.y_scale),
                           static_cast<int32_t>(fields.y_zero_point)};
    return linear::run(call) ? Status{} : Status{Fault::not_a_number};
  }

  static void cost(const Fields& fields, Tensors operands, Cost& cost) {
    const int64_t groups = operands[values].sizes[0];
    const int64_t all = ceil_div(fields.outputs, linear::kPanelOutputs) *
                        ceil_div(fields.inputs, linear::kGroupInputs);
    const double density = static_cast<double>(groups) / static_cast<double>(all);
    const auto dense = static_cast<double>(operands[y].count() * fields.inputs);
    cost.macs = std::llrint(dense * density);
    cost.peak = "int8";
    cost.density = std::nearbyint(density * 1e4) / 1e4;
  }

 private:
  static int64_t ceil_div(int64_t a, int64_t b) { return (a + b - 1) / b; }

  static linear::Quantisation x_quantisation(const Fields& fields) {
    return {static_cast<float>(fields.x_scale), static_cast<int32_t>(fields.x_zero_point)};
  }

  static linear::Weight weight_of(const Fields& fields, Tensors operands) {
    return {operands[values].as<int8_t>(),
            operands[group_index].as<int32_t>(),
            operands[panel_start].as<int32_t>(),
            operands[w_scale].as<float>(),
            operands[w_sum].as<int32_t>(),
            operands[bias].as<float>(),
            fields.outputs,
            fields.inputs};
  }

  static linear::Dtype dtype_of(const Tensor& tensor, bool tiles) {
    if (tiles) return linear::Dtype::u8_tiles;
    return tensor.dtype == Dtype::u8 ? linear::Dtype::u8 : linear::Dtype::f32;
  }

  // The kernel walks the groups of each panel: their numbers are read here.
  static void check_weight(const StepCheck& check, int64_t outputs, int64_t inputs) {
    const Shape& index_sizes = check.sizes(group_index);
    require(!index_sizes.empty(), "groups of weights");
    const int64_t groups = index_sizes[0].coefficient;
    check.table(values, Dtype::s8, {groups, linear::kGroupBytes});
    check.table(group_index, Dtype::i32, {groups});
    check.table(panel_start, Dtype::i32, {ceil_div(outputs, linear::kPanelOutputs) + 1});
    const auto start = check.integers(panel_start), index = check.integers(group_index);
    require(start.front() == 0 && start.back() == groups, "panels that own all groups");
    require(std::is_sorted(start.begin(), start.end()), "panels one after another");
    const int64_t reach = ceil_div(inputs, linear::kGroupInputs);
    require(std::all_of(index.begin(), index.end(),
                        [&](int32_t group) { return group >= 0 && group < reach; }),
            "groups among the inputs");
  }
};

}  // namespace

Kind linear_int8_kind() { return make_kind<LinearInt8>(); }

}  // namespace fastrec::engine
