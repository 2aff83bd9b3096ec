#include "sparse_int8_linear.h"

#include <cmath>

namespace fastrec::onnxruntime {

namespace {

namespace linear = sparse_int8_linear;

constexpr auto kF32 = ONNX_TENSOR_ELEMENT_DATA_TYPE_FLOAT;
constexpr auto kU8 = ONNX_TENSOR_ELEMENT_DATA_TYPE_UINT8;
constexpr auto kS8 = ONNX_TENSOR_ELEMENT_DATA_TYPE_INT8;
constexpr auto kS32 = ONNX_TENSOR_ELEMENT_DATA_TYPE_INT32;

linear::Activation activation_of(const std::string& name) {
  if (name == "none") return linear::Activation::none;
  if (name == "relu") return linear::Activation::relu;
  if (name == "gelu") return linear::Activation::gelu;
  throw std::invalid_argument("activation: expected none, relu or gelu, got " + name);
}

linear::Quantisation quantisation(const Node& node, const std::string& of) {
  const float scale = node.number((of + "_scale").c_str());
  const int64_t zero_point = node.integer((of + "_zero_point").c_str());
  require(std::isfinite(scale) && scale > 0, "a positive scale");
  require(zero_point >= 0 && zero_point <= 255, "a zero point in 0..255");
  return {scale, static_cast<int32_t>(zero_point)};
}

// Throws unless kernels may follow the indices blindly; the sum of each output's weights.
std::vector<int32_t> checked_sums(const linear::Weight& weight, int64_t groups, int64_t starts) {
  const int64_t panels = (weight.outputs + linear::kPanelOutputs - 1) / linear::kPanelOutputs;
  const int64_t positions = (weight.inputs + linear::kGroupInputs - 1) / linear::kGroupInputs;
  require(starts == panels + 1 && weight.panel_start[0] == 0, "a start for each panel, from 0");
  for (int64_t p = 0; p < panels; ++p)
    require(weight.panel_start[p] <= weight.panel_start[p + 1], "starts that never fall");
  require(weight.panel_start[panels] == groups, "as many groups as the last start says");
  for (int64_t g = 0; g < groups; ++g)
    require(weight.group_index[g] >= 0 && weight.group_index[g] < positions,
            "indices of groups within the inputs");
  std::vector<int32_t> sums(panels * linear::kPanelOutputs, 0);
  for (int64_t p = 0; p < panels; ++p)
    for (int64_t g = weight.panel_start[p]; g < weight.panel_start[p + 1]; ++g)
      for (int64_t b = 0; b < linear::kGroupBytes; ++b)
        sums[p * linear::kPanelOutputs + b / linear::kGroupInputs] +=
            weight.values[g * linear::kGroupBytes + b];
  return sums;
}

}  // namespace

Signature SparseInt8Linear::signature() {
  return {{ONNX_TENSOR_ELEMENT_DATA_TYPE_UNDEFINED, kS8, kS32, kS32, kF32, kF32}, 1, kF32};
}

Signature SparseInt8LinearU8::signature() {
  Signature like = SparseInt8Linear::signature();
  like.output = kU8;
  return like;
}

SparseInt8Linear::SparseInt8Linear(const Node& node, bool quantised)
    : inputs_(node.integer("in_features")),
      has_bias_(node.inputs() > 5),
      quantised_(quantised),
      x_(quantisation(node, "x")),
      activation_(activation_of(node.text("activation"))) {
  if (quantised) y_ = quantisation(node, "out");
  require(inputs_ >= 1 && inputs_ <= linear::kMaxInputs, "1 to 65,793 inputs");
  const Value values = node.constant(1, "values", kS8);
  const Value group_index = node.constant(2, "group_index", kS32);
  const Value panel_start = node.constant(3, "panel_start", kS32);
  const Value scale = node.constant(4, "w_scale", kF32);
  const Value bias = has_bias_ ? node.constant(5, "bias", kF32) : Value{};
  outputs_ = scale.count();
  require(outputs_ >= 1 && panel_start.count() >= 2, "outputs");
  require(values.count() == group_index.count() * linear::kGroupBytes, "128 values a group");
  require(!has_bias_ || bias.count() == outputs_, "a bias for each output");
  linear::Weight weight = weight_of(values, group_index, panel_start, scale, bias);
  sums_ = checked_sums(weight, group_index.count(), panel_start.count());
  weight.sum = sums_.data();
  folding_ = std::make_unique<linear::Folding>(weight, x_);
}

linear::Weight SparseInt8Linear::weight_of(const Value& values, const Value& group_index,
                                           const Value& panel_start, const Value& scale,
                                           const Value& bias) const {
  return {values.as<int8_t>(),
          group_index.as<int32_t>(),
          panel_start.as<int32_t>(),
          scale.as<float>(),
          sums_.data(),
          bias.as<float>(),
          outputs_,
          inputs_};
}

void SparseInt8Linear::run(const Call& call) const {
  const Value x = call.input(0);
  require(x.type == kF32 || x.type == kU8, "x of float32 or uint8");
  require(!x.shape.empty() && x.shape.back() == inputs_,
          "x with in_features in its last dimension");
  std::vector<int64_t> shape = x.shape;
  shape.back() = outputs_;
  const Value y = call.output(0, shape);
  linear::Call work{};
  work.weight = weight_of(call.input(1), call.input(2), call.input(3), call.input(4),
                          has_bias_ ? call.input(5) : Value{});
  work.folded = folding_->folded();
  work.x = x.data;
  work.x_dtype = x.type == kU8 ? linear::Dtype::u8 : linear::Dtype::f32;
  work.x_quantisation = x_;
  work.rows = x.count() / inputs_;
  work.activation = activation_;
  work.y = y.data;
  work.y_dtype = quantised_ ? linear::Dtype::u8 : linear::Dtype::f32;
  work.y_quantisation = y_;
  if (!linear::run(work)) throw std::invalid_argument("x: a NaN cannot be quantised");
}

}  // namespace fastrec::onnxruntime
