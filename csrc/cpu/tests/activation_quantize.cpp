#include "activation_quantize/activation_quantize.h"

#include <cmath>

#include "check.h"
#include "element.h"

namespace fastrec::tests {
namespace {

using namespace activation_quantize;

using Bytes = std::vector<uint8_t>;

template <class T>
Bytes bytes_of(const std::vector<T>& values) {
  const auto* begin = reinterpret_cast<const uint8_t*>(values.data());
  return Bytes(begin, begin + values.size() * sizeof(T));
}

struct Case {
  Input x;
  Activation activation;
  Output y;
  int64_t rows, channels;
  bool bias = true;
};

// The values that a clamp, a conversion or a rounding may get wrong are among the inputs.
Bytes inputs(const Case& c, Random& random) {
  const int64_t count = c.rows * c.channels;
  if (c.x == Input::s32) {
    auto values = random.integers<int32_t>(count, INT32_MIN, INT32_MAX);
    for (int64_t i = 0; i < count; i += 2) values[i] %= 1000;
    if (count > 2) values[0] = INT32_MIN, values[count - 1] = INT32_MAX;
    return bytes_of(values);
  }
  auto values = random.floats(count, 8.0f);
  constexpr float kEdges[] = {-INFINITY, INFINITY, -0.0f, 3e38f, -3e38f, 1e-40f, 0.025f, 0.075f};
  for (int64_t i = 0; i < count && i < 8; ++i) values[count - 1 - i] = kEdges[i];
  // gelu(-inf) is a NaN, whose sign and payload do not matter.
  if (c.activation == Activation::gelu && count) values[count - 1] = -20.0f;
  if (c.x == Input::f32) return bytes_of(values);
  std::vector<uint16_t> halves;
  for (const float value : values) halves.push_back(to_bf16(value));
  return bytes_of(halves);
}

size_t size_of(Output type) { return type == Output::u8 ? 1 : type == Output::bf16 ? 2 : 4; }

void compare(const Case& c) {
  Random random(11);
  const Bytes x = inputs(c, random);
  const bool sums = c.x == Input::s32;
  const auto scale = random.floats(sums ? c.channels : 0, 0.01f);
  const auto bias = random.floats(sums && c.bias ? c.channels : 0);
  const int64_t count = c.rows * c.channels;
  const bool in_place_fits = x.size() == count * size_of(c.y);
  const auto run_at = [&](Place place, bool in_place) {
    Buffer<uint8_t> in(x, place), out(in_place ? 0 : count * size_of(c.y), place);
    const Buffer<float> scales(scale, place), biases(bias, place);
    Buffer<uint8_t>& y = in_place ? in : out;
    CHECK(
        run({in.data(), c.x, sums ? scales.data() : nullptr, bias.empty() ? nullptr : biases.data(),
             c.activation, y.data(), c.y, Quantisation{0.05f, 113}, count, c.channels}));
    return y.values();
  };
  Bytes expected;
  as_scalar([&] { expected = run_at(Place::heap, false); });
  for_every_setting("rows " + std::to_string(c.rows) + " channels " + std::to_string(c.channels),
                    [&](Place place) {
                      CHECK(run_at(place, false) == expected);
                      if (in_place_fits) CHECK(run_at(place, true) == expected);
                    });
}

}  // namespace

TEST(activation_quantize_is_exact_within_bounds) {
  for (const Input x : {Input::f32, Input::bf16, Input::s32})
    for (const Activation activation : {Activation::none, Activation::relu, Activation::gelu})
      for (const Output y : {Output::u8, Output::bf16, Output::f32})
        for (const int64_t channels : {1, 15, 16, 17, 33, 65})
          compare({x, activation, y, 3, channels, channels % 2 == 1});
}

TEST(activation_quantize_of_nothing_and_on_threads) {
  for (const Input x : {Input::f32, Input::bf16, Input::s32}) {
    compare({x, Activation::none, Output::u8, 0, 16});
    compare({x, Activation::gelu, Output::u8, 1, 1});
    compare({x, Activation::relu, Output::u8, 1025, 131});  // beyond one thread's share
  }
}

TEST(activation_quantize_tells_a_nan) {
  for (const int64_t count : {1, 16, 17, 140'000})
    for (const int64_t at : {int64_t{0}, count / 2, count - 1}) {
      std::vector<float> values(static_cast<size_t>(count), INFINITY);
      values[static_cast<size_t>(at)] = NAN;
      for_every_setting("NaN at " + std::to_string(at), [&](Place place) {
        const Buffer<float> x(values, place);
        Buffer<uint8_t> y(values.size(), place);
        for (const Activation activation : {Activation::none, Activation::relu, Activation::gelu})
          CHECK(!run({x.data(), Input::f32, nullptr, nullptr, activation, y.data(), Output::u8,
                      Quantisation{0.05f, 113}, count, 0}));
      });
    }
}

}  // namespace fastrec::tests
