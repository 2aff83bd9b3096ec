// Plain loops, any machine: bit for bit what the vector kernels compute.
#include "activation_quantize/activation_quantize.h"
#include "element.h"

namespace fastrec::activation_quantize {
namespace {

float input(const Call& call, int64_t i) {
  if (call.x_type == Input::f32) return static_cast<const float*>(call.x)[i];
  if (call.x_type == Input::bf16) return from_bf16(static_cast<const uint16_t*>(call.x)[i]);
  const int64_t channel = i % call.channels;
  const float value =
      static_cast<float>(static_cast<const int32_t*>(call.x)[i]) * call.scale[channel];
  return call.bias ? value + call.bias[channel] : value;
}

float activate(float value, Activation activation) {
  if (activation == Activation::relu) return value < 0.0f ? 0.0f : value;
  return activation == Activation::gelu ? gelu(value) : value;
}

bool elements(const Call& call, int64_t begin, int64_t end) {
  bool numbers = true;
  for (int64_t i = begin; i < end; ++i) {
    const float value = activate(input(call, i), call.activation);
    if (call.y_type == Output::f32)
      static_cast<float*>(call.y)[i] = value;
    else if (call.y_type == Output::bf16)
      static_cast<uint16_t*>(call.y)[i] = to_bf16(value);
    else if (std::isnan(value))
      numbers = false;
    else
      static_cast<uint8_t*>(call.y)[i] = quantise(value, call.quantisation);
  }
  return numbers;
}

}  // namespace

const Kernel kScalar = {Isa::scalar, elements};

}  // namespace fastrec::activation_quantize
