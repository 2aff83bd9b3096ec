#include "window_sparse_attention_int8/window_sparse_attention_int8.h"

#include "attention_inputs.h"
#include "check.h"

namespace fastrec::tests {
namespace {

namespace op = window_sparse_attention_int8;

struct Case {
  Sizes sizes;
  Seen seen;
  bool q_u8 = true, v_f32 = false, out_u8 = false;
  bool together = false;
  std::vector<int64_t> lengths = {};
  std::vector<int64_t> starts = {};  // of sequences in one batch, as it lies together
  int64_t keys = -1;                 // of another number than the queries, in u8, as v then is
  Sizes of_keys() const {
    return {sizes.batch, sizes.heads, keys < 0 ? sizes.rows : keys, sizes.dims};
  }
};

std::vector<uint8_t> bytes_of(const std::vector<float>& values) {
  std::vector<uint8_t> bytes(values.size() * sizeof(float));
  if (!bytes.empty()) std::memcpy(bytes.data(), values.data(), bytes.size());
  return bytes;
}

std::string name(const Case& c) {
  return text_of(c.sizes) + " " + c.seen.text() + (c.q_u8 ? " q u8" : " q s8") +
         (c.v_f32 ? " v f32" : " v s8") + (c.out_u8 ? " out u8" : " out f32") +
         (c.together ? " together" : "") + (c.lengths.empty() ? "" : " lengths") +
         (c.starts.empty() ? "" : " jagged") +
         (c.keys < 0 ? "" : " keys " + std::to_string(c.keys));
}

// q, k and v as they lie in memory.
struct Inputs {
  explicit Inputs(const Case& c) {
    Random random(13);
    const size_t count = c.of_keys().elements();
    q = random.integers<uint8_t>(c.sizes.elements(), 0, 255);
    k = random.integers<uint8_t>(count, 0, 255);
    spoil_beyond<uint8_t>(c.lengths, c.of_keys(), c.together, 0x80, &k);
    if (c.v_f32) {
      std::vector<float> values = random.floats(count, 5.0f);
      spoil_beyond(c.lengths, c.of_keys(), c.together, NAN, &values);
      v = bytes_of(values);
    } else {
      v = random.integers<uint8_t>(count, 0, 255);
      v_scale = random.floats(std::max(c.sizes.batch, static_cast<int64_t>(c.starts.size())) *
                              c.sizes.heads);
      for (float& scale : v_scale) scale = std::abs(scale);
    }
  }
  std::vector<uint8_t> q, k, v;
  std::vector<float> v_scale;
};

// The status of run() and the bytes it wrote.
struct Outcome {
  int64_t code;
  std::vector<uint8_t> out;
};

Outcome run_at(const Case& c, const Inputs& inputs, Place place) {
  const Buffer<uint8_t> q(inputs.q, place), k(inputs.k, place), v(inputs.v, place);
  const Buffer<float> v_scale(inputs.v_scale, place);
  const Buffer<int64_t> lengths(c.lengths, place), distances(c.seen.flat(), place),
      starts(c.seen.starts(), place);
  Buffer<uint8_t> out(c.sizes.elements() * (c.out_u8 ? 1 : 4), place);
  const auto rows = [&](const Buffer<uint8_t>& buffer, const Sizes& sizes) {
    const Strides at(sizes, c.together);
    return op::Rows{buffer.data(), at.batch, at.head, at.row};
  };
  op::Call call{};
  call.q = rows(q, c.sizes);
  call.k = rows(k, c.of_keys());
  call.v = rows(v, c.of_keys());
  call.k_u8 = c.keys >= 0;
  call.v_u8 = c.keys >= 0 && !c.v_f32;
  call.q_u8 = c.q_u8;
  call.v_f32 = c.v_f32;
  call.out_u8 = c.out_u8;
  call.q_zero_point = c.q_u8 ? 117 : 0;
  call.exponent_scale = 3e-4f / std::sqrt(static_cast<float>(c.sizes.dims));
  call.v_scale = c.v_f32 ? nullptr : v_scale.data();
  call.out = {out.data(), c.sizes.heads * c.sizes.rows * c.sizes.dims, c.sizes.rows * c.sizes.dims,
              c.sizes.dims};
  if (!c.starts.empty()) call.out = {out.data(), 0, c.sizes.dims, c.sizes.heads * c.sizes.dims};
  call.out_scale = 0.04f;
  call.out_zero_point = 120;
  call.lengths = c.lengths.empty() ? nullptr : lengths.data();
  call.pattern = {c.seen.window, c.seen.causal, distances.data(), starts.data()};
  const Buffer<int64_t> sequences(c.starts, place);
  call.cu_seqlens = c.starts.empty() ? nullptr : sequences.data();
  call.batch = c.starts.empty() ? c.sizes.batch : static_cast<int64_t>(c.starts.size()) - 1;
  call.heads = c.sizes.heads;
  call.length = c.sizes.rows;
  call.dims = c.sizes.dims;
  call.key_rows = c.of_keys().rows;
  const int64_t code = op::run(call);
  return {code, out.values()};
}

// All instruction sets agree to the last bit.
void compare(const Case& c) {
  const Inputs inputs(c);
  Outcome expected;
  as_scalar([&] { expected = run_at(c, inputs, Place::heap); });
  for_every_setting(name(c), [&](Place place) {
    const Outcome actual = run_at(c, inputs, place);
    CHECK(actual.code == op::kDone);
    CHECK(actual.out == expected.out);
  });
}

}  // namespace

TEST(window_sparse_attention_int8_rows) {
  for (const bool causal : {false, true})
    for (const Seen& seen : patterns_of_two_heads(causal))
      for (const int64_t rows : {0, 1, 7, 8, 9, 15, 16, 17, 33, 65})
        compare({{1, 2, rows, 16}, seen, rows % 2 == 0, rows % 3 == 0, rows % 4 == 1, causal});
}

TEST(window_sparse_attention_int8_dims) {
  const Seen seen{2, false, {{5, 16, 30}, {3}}};
  for (const int64_t dims : {1, 2, 3, 4, 5, 7, 8, 9, 15, 16, 17, 31, 32, 33, 63, 64, 65, 255, 256})
    for (const bool v_f32 : {false, true})
      compare({{1, 2, 19, dims}, seen, dims % 2 == 0, v_f32, dims % 3 == 0, v_f32});
}

TEST(window_sparse_attention_int8_dtypes_and_lengths) {
  for (const bool causal : {false, true})
    for (const bool q_u8 : {false, true})
      for (const bool v_f32 : {false, true})
        for (const bool out_u8 : {false, true})
          for (const bool together : {false, true})
            compare({{5, 2, 35, 20},
                     {3, causal, {{4, 9, 33}, {16, 18}}},
                     q_u8,
                     v_f32,
                     out_u8,
                     together,
                     {0, 1, 16, 17, 35}});
}

TEST(window_sparse_attention_int8_other_keys) {
  for (const int64_t window : {2, 1000})
    for (const int64_t rows : {1, 16, 50, 130})
      for (const int64_t keys : {0, 1, 15, 16, 17, 64, 100})
        compare({{2, 2, rows, 20},
                 {window, false, {{}, {}}},
                 true,
                 keys % 2 == 1,
                 true,
                 rows == 50,
                 keys == 64 ? std::vector<int64_t>{64, 5} : std::vector<int64_t>{},
                 {},
                 keys});
}

TEST(window_sparse_attention_int8_parts_and_threads) {
  compare({{1, 2, 300, 32}, {4, false, {{20, 130, 299}, {5}}}, true, true, true, true});
  compare({{2, 2, 130, 48}, {40, true, {{60, 128}, {}}}, false, false, false, false, {129, 40}});
}

TEST(window_sparse_attention_int8_jagged) {
  for (const bool v_f32 : {false, true})
    for (const bool out_u8 : {false, true}) {
      const Seen seen{3, v_f32, {{4, 9, 33, 120}, {16, 18}}};
      compare({{1, 2, 190, 20}, seen, true, v_f32, out_u8, true, {}, {0, 0, 1, 17, 33, 190, 190}});
      compare({{1, 2, 0, 20}, seen, true, v_f32, out_u8, true, {}, {0, 0}});
    }
}

TEST(window_sparse_attention_int8_says_what_is_wrong) {
  const Case floats{{2, 1, 20, 9}, {2, false, {{7}}}, true, true, false, false, {20, 6}};
  for (const float bad : {NAN, INFINITY, -INFINITY})
    for (const int64_t row : {0, 19, 20, 25}) {
      Inputs inputs(floats);
      std::memcpy(&inputs.v[(row * 9 + 8) * sizeof(float)], &bad, sizeof(bad));
      for_every_setting("v not finite", [&](Place place) {
        CHECK(run_at(floats, inputs, place).code == op::kNotFinite);
      });
    }
  const Case bytes{{2, 1, 20, 9}, {2, false, {{7}}}};
  for (const float bad : {NAN, INFINITY, -1.0f}) {
    Inputs inputs(bytes);
    inputs.v_scale[1] = bad;
    CHECK(run_at(bytes, inputs, Place::before_guard).code == op::kBadScale);
  }
  const Inputs inputs(bytes);
  for (const int64_t bad : {int64_t{-1}, int64_t{21}, INT64_MAX}) {
    Case wrong = bytes;
    wrong.lengths = {20, bad};
    CHECK(run_at(wrong, inputs, Place::before_guard).code == 1);
  }
  const std::vector<std::vector<int64_t>> bad_starts = {{1, 20}, {0, 21}, {0, 12, 8, 20}, {0}};
  for (const auto& starts : bad_starts) {
    Case wrong{{1, 1, 20, 9}, {2, false, {{7}}}};
    wrong.starts = starts;
    const int64_t first = starts == bad_starts[2] ? 2 : starts == bad_starts[1] ? 1 : 0;
    CHECK(run_at(wrong, Inputs(wrong), Place::before_guard).code == first);
  }
}

}  // namespace fastrec::tests
