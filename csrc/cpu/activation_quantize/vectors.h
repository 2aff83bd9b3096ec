// The vector kernel, written once over sixteen lanes; an ISA file includes its vec16 header and
// this one. One loop for each input, activation and output.
#include "activation_quantize/activation_quantize.h"
#include "vec16_math.h"

namespace fastrec::activation_quantize {
namespace {

template <Input type>
FASTREC_VEC_INLINE Floats input(const Call& call, int64_t i, int64_t channel, Lanes lanes) {
  if constexpr (type == Input::f32) return load(static_cast<const float*>(call.x) + i, lanes);
  if constexpr (type == Input::bf16)
    return load_bf16(static_cast<const uint16_t*>(call.x) + i, lanes);
  const Floats acc = to_float(load_int(static_cast<const int32_t*>(call.x) + i, lanes));
  const Floats value = multiply(acc, load(call.scale + channel, lanes));
  return call.bias ? add(value, load(call.bias + channel, lanes)) : value;
}

template <Input x_type, Activation activation, Output y_type>
FASTREC_VEC_INLINE void step(const Call& call, int64_t i, int64_t channel, Lanes lanes,
                             const Quantiser& to, Floats& poison) {
  Floats value = input<x_type>(call, i, channel, lanes);
  if constexpr (activation == Activation::relu) value = maximum(zeros(), value);
  if constexpr (activation == Activation::gelu) value = gelu(value);
  if constexpr (y_type == Output::f32) store(static_cast<float*>(call.y) + i, value, lanes);
  if constexpr (y_type == Output::bf16)
    store_bf16(static_cast<uint16_t*>(call.y) + i, value, lanes);
  if constexpr (y_type == Output::u8) {
    // Smaller than infinity, so that only a NaN makes a NaN of the sum. Lanes behind hold zeros.
    poison = add(poison, minimum(splat(1.0f), maximum(splat(-1.0f), value)));
    store_u8(static_cast<uint8_t*>(call.y) + i, quantise(value, to), lanes);
  }
}

// Elements [begin, end), one row of channels with s32. False if a NaN was to be quantised.
template <Input x_type, Activation activation, Output y_type>
FASTREC_VEC bool segment(const Call& call, int64_t begin, int64_t end) {
  const Quantiser to = quantiser(call.quantisation);
  const Lanes every = first_lanes(kLanes);
  Floats poison = zeros();
  int64_t i = begin;
  for (; i + kLanes <= end; i += kLanes)
    step<x_type, activation, y_type>(call, i, i - begin, every, to, poison);
  if (i < end)
    step<x_type, activation, y_type>(call, i, i - begin, first_lanes(end - i), to, poison);
  return !any_nan(poison);
}

using Segment = bool (*)(const Call&, int64_t, int64_t);

template <Input x, Activation activation>
constexpr Segment kByOutput[] = {segment<x, activation, Output::u8>,
                                 segment<x, activation, Output::bf16>,
                                 segment<x, activation, Output::f32>};
template <Input x>
constexpr const Segment* kByActivation[] = {
    kByOutput<x, Activation::none>, kByOutput<x, Activation::relu>, kByOutput<x, Activation::gelu>};
constexpr const Segment* const* kSegments[] = {
    kByActivation<Input::f32>, kByActivation<Input::bf16>, kByActivation<Input::s32>};

bool elements(const Call& call, int64_t begin, int64_t end) {
  const Segment segment =
      kSegments[static_cast<int>(call.x_type)][static_cast<int>(call.activation)]
               [static_cast<int>(call.y_type)];
  const int64_t width = call.x_type == Input::s32 ? call.channels : end - begin;
  bool numbers = true;
  for (int64_t i = begin; i < end; i += width) numbers &= segment(call, i, i + width);
  return numbers;
}

}  // namespace
}  // namespace fastrec::activation_quantize
