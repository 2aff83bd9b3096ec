#include "separable_projection/separable_projection.h"

#include <cmath>

#include "check.h"

namespace fastrec::tests {
namespace {

using namespace separable_projection;

using Bytes = std::vector<uint8_t>;

size_t size_of(Dtype dtype) { return dtype == Dtype::f32 ? 4 : 2; }

Bytes encoded(const std::vector<float>& values, Dtype dtype) {
  const size_t size = size_of(dtype);  // bf16 by truncation: any value will do
  Bytes bytes(values.size() * size);
  for (size_t i = 0; i < values.size(); ++i)
    std::memcpy(&bytes[i * size], reinterpret_cast<const uint8_t*>(&values[i]) + 4 - size, size);
  return bytes;
}

std::vector<float> decoded(const Buffer<uint8_t>& buffer, Dtype dtype) {
  const size_t size = size_of(dtype);
  std::vector<float> values(buffer.size() / size);
  for (size_t i = 0; i < values.size(); ++i)
    std::memcpy(reinterpret_cast<uint8_t*>(&values[i]) + 4 - size, buffer.data() + i * size, size);
  return values;
}

struct Case {
  int64_t batch, length, groups, outputs, inputs;
  int width;
  bool causal = false;
  std::vector<int64_t> lengths = {};
  int64_t gap = 0;  // floats between rows, and again between batches
};

struct Results {
  std::vector<float> y, h, flipped, taps;
};

// x of the case's strides; NaN in the gaps and behind the lengths, which are never read.
std::vector<float> sequences(const Case& c, Random& random) {
  const int64_t channels = c.groups * c.inputs, row = channels + c.gap;
  const int64_t batch = c.length * row + c.gap;
  const int64_t rows = c.batch * c.length;
  std::vector<float> x(rows ? (c.batch - 1) * batch + (c.length - 1) * row + channels : 0, NAN);
  for (int64_t b = 0; b < c.batch; ++b)
    for (int64_t l = 0; l < (c.lengths.empty() ? c.length : c.lengths[b]); ++l) {
      const auto values = random.floats(channels);
      std::copy(values.begin(), values.end(), x.begin() + b * batch + l * row);
    }
  return x;
}

std::string name_of(const Case& c) {
  return "B" + std::to_string(c.batch) + " L" + std::to_string(c.length) + " G" +
         std::to_string(c.groups) + " O" + std::to_string(c.outputs) + " I" +
         std::to_string(c.inputs) + " W" + std::to_string(c.width);
}

void compare(const Case& c, Dtype dtype) {
  Random random(29);
  const int64_t channels = c.groups * c.inputs, wide = c.groups * c.outputs;
  const size_t rows = static_cast<size_t>(c.batch * c.length), size = size_of(dtype);
  const Bytes x = encoded(sequences(c, random), dtype);
  const Bytes depthwise = encoded(random.floats(channels * c.width), dtype);
  const Bytes pointwise = encoded(random.floats(wide * c.inputs), dtype);
  const Bytes bias = encoded(random.floats(wide), dtype);
  const auto gradient = random.floats(rows * channels);
  const auto run = [&](Place place) {
    const Buffer<uint8_t> xs(x, place), taps(depthwise, place), points(pointwise, place),
        biases(bias, place);
    const Buffer<float> dh(gradient, place);
    const Buffer<int64_t> lengths(c.lengths, place);
    Buffer<uint8_t> y(rows * wide * size, place), h(rows * channels * 4, place),
        flipped(rows * channels * size, place), dtaps(channels * c.width * size, place);
    const int64_t row = channels + c.gap;
    const Sequences in{xs.data(), dtype, c.length * row + c.gap, row};
    const Shape shape{c.batch,
                      c.length,
                      channels,
                      c.width,
                      c.causal ? c.width - 1 : c.width / 2,
                      c.lengths.empty() ? nullptr : lengths.data()};
    CHECK(forward(in, taps.data(), points.data(), c.causal ? nullptr : biases.data(), y.data(),
                  shape, c.groups, c.outputs) == -1);
    CHECK(convolve(in, taps.data(), dtype, false, h.data(), Dtype::f32, shape) == -1);
    CHECK(convolve(in, taps.data(), dtype, true, flipped.data(), dtype, shape) == -1);
    CHECK(depthwise_gradient(dh.data(), in, dtaps.data(), dtype, shape) == -1);
    return Results{decoded(y, dtype), decoded(h, Dtype::f32), decoded(flipped, dtype),
                   decoded(dtaps, dtype)};
  };
  Results expected;
  as_scalar([&] { expected = run(Place::heap); });
  // All factors lie in [-1, 1]. A sum of n products is off by at most n roundings of at most n each
  // in either implementation; h, of W products, is at most W, so that a sum of I products of h is
  // off by (I + 1)^2 roundings of W each and by what I values of h are off. bf16 results are
  // rounded once more, and a value near a tie may fall to either side: one unit in the last place,
  // 2^-7. Where h is rounded to bf16, each of its I values, at most W, is off by 2^-9 of itself.
  const double taps = c.width, terms = static_cast<double>(c.inputs + 1);
  const double sums = static_cast<double>(c.batch * c.length + 1);
  const auto agree = [](const std::vector<float>& actual, const std::vector<float>& wanted,
                        double roundings, Dtype type) {
    return worst_error(actual, wanted, 2 * roundings * 0x1p-24, type == Dtype::f32 ? 0 : 0x1p-7) <=
           1;
  };
  for_every_setting(name_of(c), [&](Place place) {
    const Results actual = run(place);
    const double rounded = dtype == Dtype::bf16 ? 0x1p-9 * 0x1p23 * terms * taps : 0;
    CHECK(agree(actual.y, expected.y, terms * taps * taps + terms * terms * taps + rounded, dtype));
    CHECK(agree(actual.h, expected.h, taps * taps, Dtype::f32));
    CHECK(agree(actual.flipped, expected.flipped, taps * taps, dtype));
    CHECK(agree(actual.taps, expected.taps, sums * sums, dtype));
  });
}

}  // namespace

TEST(separable_projection_agrees_within_bounds) {
  for (const Dtype dtype : {Dtype::f32, Dtype::bf16}) {
    for (const int64_t inputs : {1, 15, 16, 17, 33})
      for (const int64_t outputs : {1, 17, 32, 33}) compare({2, 5, 2, outputs, inputs, 3}, dtype);
    for (const int width : {1, 2, 7, 12, kMaxWidth})
      for (const int64_t length : {1, 11, 12, 13, 97})
        compare({1, length, 1, 9, 18, width, width % 2 == 0}, dtype);
  }
}

TEST(separable_projection_lengths_strides_and_threads) {
  for (const Dtype dtype : {Dtype::f32, Dtype::bf16}) {
    compare({0, 4, 1, 3, 5, 3}, dtype);
    compare({2, 0, 1, 3, 5, 3}, dtype);
    compare({5, 100, 2, 7, 9, 5, false, {0, 1, 50, 99, 100}, 3}, dtype);
    compare({3, 40, 4, 16, 16, 5, true, {40, 0, 13}, 16}, dtype);
    compare({10, 197, 2, 20, 17, 9}, dtype);  // several slices of the taps' gradient
    compare({4, 200, 4, 32, 32, 5}, dtype);   // beyond one thread's share
  }
}

TEST(separable_projection_names_a_bad_length) {
  const Buffer<float> x(2 * 4 * 8, Place::heap), taps(8 * 3, Place::heap),
      points(8 * 8, Place::heap);
  Buffer<float> y(2 * 4 * 8, Place::heap);
  const Sequences in{x.data(), Dtype::f32, 32, 8};
  for (const int64_t bad : {int64_t{-1}, int64_t{5}, INT64_MAX}) {
    const Buffer<int64_t> lengths({4, bad}, Place::heap);
    const Shape shape{2, 4, 8, 3, 1, lengths.data()};
    CHECK(forward(in, taps.data(), points.data(), nullptr, y.data(), shape, 1, 8) == 1);
    CHECK(convolve(in, taps.data(), Dtype::f32, false, y.data(), Dtype::f32, shape) == 1);
    CHECK(depthwise_gradient(x.data(), in, y.data(), Dtype::f32, shape) == 1);
  }
}

}  // namespace fastrec::tests
