#include "sparse_int8_linear/sparse_int8_linear.h"

#include <cmath>

#include "check.h"
#include "element.h"

namespace fastrec::tests {
namespace {

using namespace sparse_int8_linear;

struct Case {
  int64_t rows, outputs, inputs;
  double density;
  Activation activation = Activation::none;
  Dtype x = Dtype::u8, y = Dtype::f32;
  bool bias = true;
};

template <class T>
std::vector<uint8_t> bytes_of(const std::vector<T>& values) {
  const auto* begin = reinterpret_cast<const uint8_t*>(values.data());
  return std::vector<uint8_t>(begin, begin + values.size() * sizeof(T));
}

std::vector<uint16_t> halves_of(const std::vector<float>& values) {
  std::vector<uint16_t> halves;
  for (const float value : values) halves.push_back(to_bf16(value));
  return halves;
}

size_t size_of(Dtype dtype) { return dtype == Dtype::u8 ? 1 : dtype == Dtype::bf16 ? 2 : 4; }

// A packed weight as random as its case; the extremes of s8 are among the values.
struct Packed {
  Packed(const Case& c, Random& random) {
    const int64_t panels = (c.outputs + kPanelOutputs - 1) / kPanelOutputs;
    const int64_t groups = (c.inputs + kGroupInputs - 1) / kGroupInputs;
    sum.assign(static_cast<size_t>(c.outputs), 0);
    start.push_back(0);
    for (int64_t p = 0; p < panels; ++p) {
      const auto dice = random.integers<int>(groups, 0, 999);
      for (int64_t g = 0; g < groups; ++g) {
        if (dice[g] >= 1000 * c.density) continue;
        index.push_back(static_cast<int32_t>(g));
        auto group = random.integers<int8_t>(kGroupBytes, -128, 127);
        for (int i = 0; i < kGroupBytes; ++i) {
          const int64_t n = p * kPanelOutputs + i / kGroupInputs;
          if (n >= c.outputs || g * kGroupInputs + i % kGroupInputs >= c.inputs) group[i] = 0;
          if (n < c.outputs) sum[n] += group[i];
        }
        values.insert(values.end(), group.begin(), group.end());
      }
      start.push_back(static_cast<int32_t>(index.size()));
    }
  }
  std::vector<int8_t> values;
  std::vector<int32_t> index, start, sum;
};

void compare(const Case& c) {
  Random random(3);
  const Packed packed(c, random);
  const auto scale = random.floats(c.outputs), bias = random.floats(c.outputs, 3.0f);
  std::vector<uint8_t> x = random.integers<uint8_t>(c.rows * c.inputs, 0, 255);
  if (c.x != Dtype::u8) {
    const auto values = random.floats(c.rows * c.inputs, 9.0f);
    x = bytes_of(values);
    if (c.x == Dtype::bf16) x = bytes_of(halves_of(values));
  }
  const size_t elements = static_cast<size_t>(c.rows * c.outputs);
  const auto run_at = [&](Place place) {
    const Buffer<int8_t> values(packed.values, place);
    const Buffer<int32_t> index(packed.index, place), start(packed.start, place),
        sum(packed.sum, place);
    const Buffer<float> scales(scale, place), biases(bias, place);
    const Buffer<uint8_t> in(x, place);
    Buffer<uint8_t> out(elements * size_of(c.y), place);
    Call call{};
    call.weight.values = values.data();
    call.weight.group_index = index.data();
    call.weight.panel_start = start.data();
    call.weight.scale = scales.data();
    call.weight.sum = sum.data();
    call.weight.bias = c.bias ? biases.data() : nullptr;
    call.weight.outputs = c.outputs;
    call.weight.inputs = c.inputs;
    call.x = in.data();
    call.x_dtype = c.x;
    call.x_quantisation = {0.05f, 113};
    call.rows = c.rows;
    call.activation = c.activation;
    call.y = out.data();
    call.y_dtype = c.y;
    call.y_quantisation = {3.0f, 100};
    const Folding folding(call.weight, call.x_quantisation);
    call.folded = folding.folded();
    CHECK(run(call));
    return out.values();
  };
  std::vector<uint8_t> expected;
  as_scalar([&] { expected = run_at(Place::heap); });
  // Every instruction set takes the same IEEE steps, GELU's polynomial included.
  for_every_setting("M" + std::to_string(c.rows) + " N" + std::to_string(c.outputs) + " K" +
                        std::to_string(c.inputs) + " density " + std::to_string(c.density),
                    [&](Place place) { CHECK(run_at(place) == expected); });
}

// Two layers, the first of which writes the second's tiles: as through rows.
void compare_tiles(int64_t rows, int64_t width) {
  Random random(5);
  const Packed packed({rows, width, 40, 0.7}, random), next({rows, 33, width, 0.7}, random);
  const auto scale = random.floats(std::max<int64_t>(width, 33));
  const auto x = random.integers<uint8_t>(rows * 40, 0, 255);
  const auto run_through = [&](Dtype between, Place place) {
    const Buffer<uint8_t> in(x, place);
    const size_t elements = static_cast<size_t>(rows * tile_row_elements(width));
    Buffer<uint8_t> hidden(between == Dtype::u8 ? static_cast<size_t>(rows * width)
                                                : elements * select().element_bytes,
                           place);
    Buffer<uint8_t> out(static_cast<size_t>(rows) * 33, place);
    const auto layer = [&](const Packed& weight, int64_t outputs, int64_t inputs, const void* from,
                           Dtype from_dtype, void* to, Dtype to_dtype) {
      const Buffer<float> scales(scale, place);
      Call call{};
      call.weight = {weight.values.data(),
                     weight.index.data(),
                     weight.start.data(),
                     scales.data(),
                     weight.sum.data(),
                     nullptr,
                     outputs,
                     inputs};
      call.x = from;
      call.x_dtype = from_dtype;
      call.x_quantisation = call.y_quantisation = {0.5f, 113};
      call.rows = rows;
      call.y = to;
      call.y_dtype = to_dtype;
      const Folding folding(call.weight, call.x_quantisation);
      call.folded = folding.folded();
      CHECK(run(call));
    };
    layer(packed, width, 40, in.data(), Dtype::u8, hidden.data(), between);
    layer(next, 33, width, hidden.data(), between, out.data(), Dtype::u8);
    return out.values();
  };
  const std::vector<uint8_t> expected = run_through(Dtype::u8, Place::heap);
  for_every_setting("tiles M" + std::to_string(rows) + " width " + std::to_string(width),
                    [&](Place place) { CHECK(run_through(Dtype::u8_tiles, place) == expected); });
}

}  // namespace

TEST(sparse_int8_linear_tiles) {
  for (const int64_t rows : {1, 5, 12, 13, 50})
    for (const int64_t width : {1, 31, 32, 33, 100}) compare_tiles(rows, width);
}

TEST(sparse_int8_linear_rows) {
  for (const int64_t rows : {0, 1, 2, 5, 11, 12, 13, 23, 24, 25, 50}) compare({rows, 33, 36, 1.0});
}

TEST(sparse_int8_linear_outputs_and_inputs) {
  for (const int64_t outputs : {1, 15, 16, 17, 31, 32, 33, 63, 64, 65})
    for (const int64_t inputs : {1, 3, 4, 5, 31, 32, 33, 64, 65, 127}) {
      compare({5, outputs, inputs, 0.5});
      compare({1, outputs, inputs, 1.0, Activation::none, Dtype::u8, Dtype::u8});
    }
}

TEST(sparse_int8_linear_epilogues) {
  for (const Activation activation : {Activation::none, Activation::relu, Activation::gelu})
    for (const Dtype in : {Dtype::u8, Dtype::f32, Dtype::bf16})
      for (const Dtype out : {Dtype::u8, Dtype::f32, Dtype::bf16})
        for (const bool bias : {true, false}) compare({13, 40, 70, 0.6, activation, in, out, bias});
}

TEST(sparse_int8_linear_densities_and_threads) {
  compare({9, 70, 36, 0.0});
  compare({3, 32, 4096, 0.25});
  compare({50, 192, 256, 0.6});
  compare({1, 513, 1024, 1.0});
}

}  // namespace fastrec::tests
