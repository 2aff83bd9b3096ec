#include "padded_attention/padded_attention.h"

#include <cmath>

#include "check.h"

namespace fastrec::tests {
namespace {

struct Shape {
  int64_t batch, query_rows, key_rows, heads, head_dim;
};

// Softmax weights sum to 1 and |v| <= 1, so |out| <= 1. Scores are off by at most D * 2^-24 * |q|
// |k|
// <= 130 * 2^-24 * 130 / sqrt(130) (|q_d|, |k_d| <= 1), about 9e-5, which changes a weight by that
// share; both implementations may be off by it.
constexpr double kTolerance = 2e-4;

void compare(const Shape& shape, const std::vector<int64_t>& lengths) {
  Random random(7);
  const auto [batch, queries, keys, heads, dims] = shape;
  const int64_t width = heads * dims;
  const auto q = random.floats(batch * queries * width);
  auto k = random.floats(batch * keys * width), v = random.floats(batch * keys * width);
  // Values behind a length are never read as numbers.
  for (int64_t b = 0; b < batch && !lengths.empty(); ++b)
    for (int64_t i = (b * keys + lengths[b]) * width; i < (b + 1) * keys * width; ++i)
      k[i] = v[i] = NAN;
  const auto run = [&](Place place) {
    const Buffer<float> qs(q, place), ks(k, place), vs(v, place);
    const Buffer<int64_t> ls(lengths, place);
    Buffer<float> out(q.size(), place);
    CHECK(padded_attention::run({{qs.data(), queries * width, dims, width},
                                 {ks.data(), keys * width, dims, width},
                                 {vs.data(), keys * width, dims, width},
                                 out.data(),
                                 lengths.empty() ? nullptr : ls.data(),
                                 batch,
                                 queries,
                                 keys,
                                 heads,
                                 dims,
                                 1.0f / std::sqrt(static_cast<float>(dims))}) == -1);
    return out.values();
  };
  std::vector<float> expected;
  as_scalar([&] { expected = run(Place::heap); });
  for_every_setting(
      "keys " + std::to_string(keys) + " queries " + std::to_string(queries) + " dims " +
          std::to_string(dims),
      [&](Place place) { CHECK(worst_error(run(place), expected, kTolerance, 0) <= 1); });
}

// With a mask of `mask_heads` x `mask_rows` (1: broadcast), some of it and some rows of it hidden.
void compare_masked(const Shape& shape, int64_t mask_heads, int64_t mask_rows,
                    const std::vector<int64_t>& starts, const std::vector<int64_t>& lengths,
                    bool caps = false) {
  Random random(11);
  const auto [batch, queries, keys, heads, dims] = shape;
  const int64_t width = heads * dims;
  const auto q = random.floats(batch * queries * width);
  auto k = random.floats(batch * keys * width), v = random.floats(batch * keys * width);
  auto mask = random.floats(batch * mask_heads * mask_rows * keys);
  const int64_t rows = batch * mask_heads * mask_rows;
  for (int64_t row = 0; row < rows; ++row)
    for (int64_t j = 0; j < keys; ++j) {
      const int64_t b = row / (mask_heads * mask_rows);
      const bool outside = !starts.empty() && (j < starts[b] || j >= lengths[b]);
      if (row % 3 == 2 || j % 5 == 1) mask[row * keys + j] = -INFINITY;
      if (outside) mask[row * keys + j] = NAN;
    }
  for (int64_t b = 0; b < batch && !starts.empty(); ++b)
    for (int64_t i = 0; i < keys * width; ++i)
      if (i / width < starts[b] || i / width >= lengths[b])
        k[b * keys * width + i] = v[b * keys * width + i] = NAN;
  const auto run = [&](Place place) {
    const Buffer<float> qs(q, place), ks(k, place), vs(v, place), ms(mask, place);
    const Buffer<int64_t> ss(starts, place), ls(lengths, place);
    Buffer<float> out(q.size(), place);
    CHECK(padded_attention::run(
              {{qs.data(), queries * width, dims, width},
               {ks.data(), keys * width, dims, width},
               {vs.data(), keys * width, dims, width},
               out.data(),
               lengths.empty() ? nullptr : ls.data(),
               batch,
               queries,
               keys,
               heads,
               dims,
               1.0f / std::sqrt(static_cast<float>(dims)),
               {ms.data(), mask_heads * mask_rows * keys, mask_heads == 1 ? 0 : mask_rows * keys,
                mask_rows == 1 ? 0 : keys, caps},
               starts.empty() ? nullptr : ss.data()}) == -1);
    return out.values();
  };
  std::vector<float> expected;
  as_scalar([&] { expected = run(Place::heap); });
  for_every_setting(
      "masked, keys " + std::to_string(keys) + " queries " + std::to_string(queries),
      [&](Place place) { CHECK(worst_error(run(place), expected, kTolerance, 0) <= 1); });
}

}  // namespace

TEST(padded_attention_agrees_within_bounds) {
  for (const int64_t keys : {1, 15, 16, 17, 63, 64, 65, 100})
    for (const int64_t dims : {1, 15, 16, 17, 32, 33, 65}) compare({2, 9, keys, 2, dims}, {});
  for (const int64_t queries : {1, 7, 8, 129, 260}) compare({1, queries, 40, 4, 32}, {});
  compare({4, 20, 33, 2, 16}, {0, 1, 17, 33});
  compare({1, 8, 64, 1, 130}, {50});
}

TEST(padded_attention_agrees_under_masks) {
  for (const int64_t keys : {1, 15, 16, 17, 65, 100}) {
    compare_masked({2, 9, keys, 3, 16}, 3, 9, {}, {});
    compare_masked({3, 9, keys, 2, 17}, 1, 1, {}, {});
    compare_masked({2, 9, keys, 3, 16}, 3, 9, {}, {}, true);
  }
  compare_masked({3, 13, 40, 2, 32}, 1, 1, {0, 7, 40}, {40, 33, 40});
  compare_masked({3, 13, 40, 2, 32}, 2, 13, {1, 39, 0}, {40, 40, 0});
}

TEST(padded_attention_softmax_keeps_to_its_row) {
  for (const int64_t count : {1, 15, 16, 17, 33, 64, 100}) {
    Random random(5);
    const auto scores = random.floats(count, 8.0f);
    const auto run = [&](Place place) {
      Buffer<float> row(scores, place);
      const float inverse_sum = padded_attention::select().softmax(row.data(), count);
      auto weights = row.values();
      for (float& weight : weights) weight *= inverse_sum;
      return weights;
    };
    std::vector<float> expected;
    as_scalar([&] { expected = run(Place::heap); });
    // e^x within 2^-22 of itself, and a sum of 100.
    for_every_setting("softmax of " + std::to_string(count), [&](Place place) {
      CHECK(worst_error(run(place), expected, 1e-6, 1e-6) <= 1);
    });
  }
}

TEST(padded_attention_names_a_bad_start) {
  const Buffer<float> x(2 * 4 * 8, Place::heap);
  Buffer<float> out(2 * 4 * 8, Place::heap);
  for (const int64_t bad : {int64_t{-1}, int64_t{4}, INT64_MAX}) {
    const Buffer<int64_t> lengths({4, 3}, Place::heap), starts({4, bad}, Place::heap);
    const padded_attention::Rows rows{x.data(), 32, 8, 8};
    CHECK(padded_attention::run({rows,
                                 rows,
                                 rows,
                                 out.data(),
                                 lengths.data(),
                                 2,
                                 4,
                                 4,
                                 1,
                                 8,
                                 1.0f,
                                 {},
                                 starts.data()}) == 1);
  }
}

TEST(padded_attention_names_a_bad_length) {
  const Buffer<float> x(2 * 4 * 8, Place::heap);
  Buffer<float> out(2 * 4 * 8, Place::heap);
  for (const int64_t bad : {int64_t{-1}, int64_t{5}, INT64_MAX}) {
    const Buffer<int64_t> lengths({4, bad}, Place::heap);
    const padded_attention::Rows rows{x.data(), 32, 8, 8};
    CHECK(padded_attention::run(
              {rows, rows, rows, out.data(), lengths.data(), 2, 4, 4, 1, 8, 1.0f, {}, nullptr}) ==
          1);
  }
}

}  // namespace fastrec::tests
