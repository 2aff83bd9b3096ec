#include "layer_norm_quantize/layer_norm_quantize.h"

#include <cmath>

#include "check.h"

namespace fastrec::tests {
namespace {

using namespace layer_norm_quantize;

struct Case {
  int64_t rows, dims;
  bool residual, affine, sum, in_place, y_u8;  // in_place: the sum, else an f32 y, goes into x
};

struct Results {
  std::vector<uint8_t> y, sum;
  bool operator==(const Results&) const = default;
};

std::vector<uint8_t> bytes_of(const Buffer<float>& buffer) {
  const auto* begin = reinterpret_cast<const uint8_t*>(buffer.data());
  return std::vector<uint8_t>(begin, begin + buffer.size() * sizeof(float));
}

void compare(const Case& c) {
  Random random(13);
  const size_t count = static_cast<size_t>(c.rows * c.dims);
  auto x = random.floats(count, 5.0f);
  // A row of one value has no variance.
  for (size_t i = 0; i < count && i < static_cast<size_t>(c.dims); ++i) x[i] = 2.0f;
  const auto residual = random.floats(c.residual ? count : 0);
  const auto weight = random.floats(c.affine ? c.dims : 0), bias = random.floats(weight.size());
  const auto run_at = [&](Place place) {
    Buffer<float> xs(x, place), sums(c.sum && !c.in_place ? count : 0, place);
    const Buffer<float> residuals(residual, place), weights(weight, place), biases(bias, place);
    const bool y_in_place = c.in_place && !c.sum && !c.y_u8;
    Buffer<float> floats(c.y_u8 || y_in_place ? 0 : count, place);
    Buffer<uint8_t> units(c.y_u8 ? count : 0, place);
    Buffer<float>& sum = c.in_place ? xs : sums;
    Buffer<float>& y = y_in_place ? xs : floats;
    CHECK(run({xs.data(), c.residual ? residuals.data() : nullptr,
               c.affine ? weights.data() : nullptr, c.affine ? biases.data() : nullptr,
               c.sum ? sum.data() : nullptr, c.y_u8 ? static_cast<void*>(units.data()) : y.data(),
               c.y_u8, Quantisation{0.02f, 120}, 1e-5f, c.rows, c.dims}));
    Results results{c.y_u8 ? units.values() : bytes_of(y), {}};
    if (c.sum) results.sum = bytes_of(sum);
    return results;
  };
  Results expected;
  as_scalar([&] { expected = run_at(Place::heap); });
  for_every_setting("rows " + std::to_string(c.rows) + " dims " + std::to_string(c.dims),
                    [&](Place place) { CHECK(run_at(place) == expected); });
}

}  // namespace

TEST(layer_norm_quantize_is_exact_within_bounds) {
  for (const int64_t dims : {1, 15, 16, 17, 31, 63, 64, 65, 79, 127, 130})
    for (int bits = 0; bits < 32; ++bits)
      compare({3, dims, (bits & 1) != 0, (bits & 2) != 0, (bits & 4) != 0, (bits & 8) != 0,
               (bits & 16) != 0});
}

TEST(layer_norm_quantize_rows_and_threads) {
  for (const int64_t rows : {0, 1, 2, 1500})  // the last one is beyond one thread's share
    for (const bool y_u8 : {false, true}) compare({rows, 96, true, true, true, false, y_u8});
}

TEST(layer_norm_quantize_tells_a_nan) {
  for (const int64_t dims : {1, 16, 65, 2100})
    for (const float odd : {NAN, INFINITY}) {  // of an infinity the normal form is a NaN
      std::vector<float> values(static_cast<size_t>(70 * dims), 1.0f);
      values[values.size() - 1] = odd;
      for_every_setting("NaN among " + std::to_string(dims), [&](Place place) {
        const Buffer<float> x(values, place);
        Buffer<uint8_t> y(values.size(), place);
        CHECK(!run({x.data(), nullptr, nullptr, nullptr, nullptr, y.data(), true,
                    Quantisation{0.02f, 120}, 1e-5f, 70, dims}));
        CHECK(run({x.data(), nullptr, nullptr, nullptr, nullptr, y.data(), true,
                   Quantisation{0.02f, 120}, 1e-5f, 69, dims}));
      });
    }
}

}  // namespace fastrec::tests
