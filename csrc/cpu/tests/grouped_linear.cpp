#include "grouped_linear/grouped_linear.h"

#include <algorithm>

#include "check.h"

namespace fastrec::tests {
namespace {

using namespace grouped_linear;

std::vector<uint8_t> encoded(const std::vector<float>& values, Dtype dtype) {
  std::vector<uint8_t> bytes;
  for (const float value : values) {
    uint32_t bits;
    std::memcpy(&bits, &value, 4);
    const int first = dtype == Dtype::f32 ? 0 : 16;  // bf16 by truncation: any value will do
    for (int shift = first; shift < 32; shift += 8)
      bytes.push_back(static_cast<uint8_t>(bits >> shift));
  }
  return bytes;
}

std::vector<float> decoded(const std::vector<uint8_t>& bytes, Dtype dtype) {
  const size_t size = dtype == Dtype::f32 ? 4 : 2;
  std::vector<float> values(bytes.size() / size);
  for (size_t i = 0; i < values.size(); ++i)
    std::memcpy(reinterpret_cast<uint8_t*>(&values[i]) + 4 - size, &bytes[i * size], size);
  return values;
}

struct Results {
  std::vector<float> y, dx, dweight, dbias;
};

void compare(const Sizes& sizes, Dtype dtype, bool bias, bool shuffled) {
  Random random(5);
  const auto [rows, groups, outputs, inputs] = sizes;
  const int64_t wide = groups * outputs, narrow = groups * inputs;
  const size_t size = dtype == Dtype::f32 ? 4 : 2;
  const auto x = encoded(random.floats(rows * narrow), dtype);
  const auto weight = encoded(random.floats(wide * inputs), dtype);
  const auto start = encoded(random.floats(wide), dtype);
  const auto dy = encoded(random.floats(rows * wide), dtype);
  const Channels out_channels = shuffled ? Channels{1, groups} : Channels{outputs, 1};
  const auto run = [&](Place place) {
    const Buffer<uint8_t> xs(x, place), ws(weight, place), bs(start, place), dys(dy, place);
    Buffer<uint8_t> y(rows * wide * size, place), dx(rows * narrow * size, place),
        dw(wide * inputs * size, place), db(wide * size, place);
    const Matrix in{xs.data(), dtype, narrow, {inputs, 1}};
    const Matrix d_out{dys.data(), dtype, wide, out_channels};
    forward(in, ws.data(), bias ? bs.data() : nullptr, {y.data(), dtype, wide, out_channels},
            sizes);
    input_gradient(d_out, ws.data(), {dx.data(), dtype, narrow, {inputs, 1}}, sizes);
    weight_gradient(d_out, in, dw.data(), bias ? db.data() : nullptr, sizes);
    Results results{
        decoded(y.values(), dtype), decoded(dx.values(), dtype), decoded(dw.values(), dtype), {}};
    if (bias) results.dbias = decoded(db.values(), dtype);
    return results;
  };
  Results expected;
  as_scalar([&] { expected = run(Place::heap); });
  // All factors lie in [-1, 1]. A sum of n products in fp32, in any order, is off by at most n
  // roundings of at most n each: n^2 * 2^-24 for either implementation. bf16 results are rounded
  // once more, and a value near a tie may fall to either side: one unit in the last place, 2^-7.
  const auto agree = [&](const std::vector<float>& actual, const std::vector<float>& wanted,
                         int64_t terms) {
    const double n = static_cast<double>(terms + 1);
    return worst_error(actual, wanted, 2 * n * n / (1 << 24), dtype == Dtype::f32 ? 0 : 0x1p-7) <=
           1;
  };
  for_every_setting("M" + std::to_string(rows) + " G" + std::to_string(groups) + " O" +
                        std::to_string(outputs) + " I" + std::to_string(inputs) +
                        (dtype == Dtype::f32 ? " f32" : " bf16"),
                    [&](Place place) {
                      const Results actual = run(place);
                      CHECK(agree(actual.y, expected.y, inputs));
                      CHECK(agree(actual.dx, expected.dx, outputs));
                      CHECK(agree(actual.dweight, expected.dweight, rows));
                      CHECK(agree(actual.dbias, expected.dbias, rows));
                    });
}

}  // namespace

TEST(grouped_linear_agrees_within_bounds) {
  for (const Dtype dtype : {Dtype::f32, Dtype::bf16})
    for (const bool shuffled : {false, true}) {
      for (const int64_t outputs : {1, 15, 16, 17, 31, 32, 33, 65})
        for (const int64_t inputs : {1, 15, 16, 17, 64})
          compare({5, 3, outputs, inputs}, dtype, true, shuffled);
      for (const int64_t rows : {0, 1, 2, 11, 12, 13, 25, 100})
        compare({rows, 2, 20, 9}, dtype, rows % 2, shuffled);
      compare({300, 4, 64, 64}, dtype, true, shuffled);
    }
}

}  // namespace fastrec::tests
