// The step window_sparse_attention_int8 on operands that begin or end at a guard page: all
// instruction sets give the bits of the scalar kernels.
#include "engine_plans.h"

namespace fastrec::tests {
namespace {

struct Pattern {
  bool causal;
  int64_t window;
  json::List distances;
};

void compare(int64_t queries, int64_t keys, const Pattern& pattern, bool floats) {
  constexpr int64_t kBatch = 2, kHeads = 2, kDims = 9;
  Random random(5);
  const auto count = [&](int64_t rows) { return kBatch * kHeads * rows * kDims; };
  const auto q = random.integers<uint8_t>(count(queries), 0, 255);
  const auto k = random.integers<uint8_t>(count(keys), 0, 255);
  const auto v = random.integers<uint8_t>(count(keys), 0, 255);
  const auto wide = random.floats(count(keys), 3.0f);
  const std::vector<int64_t> lengths{keys, keys / 3};
  const json::Object fields{{"exponent_scale", 1e-4},   {"v_scale", 0.02},
                            {"y_scale", 0.03},          {"q_zero_point", 128},
                            {"y_zero_point", 90},       {"causal", pattern.causal},
                            {"window", pattern.window}, {"distances", pattern.distances}};

  const auto run_at = [&](Place place) {
    const Buffer<uint8_t> q_at(q, place), k_at(k, place), v_at(v, place);
    const Buffer<float> wide_at(wide, place);
    const Buffer<int64_t> lengths_at(lengths, place);
    Buffer<uint8_t> out(count(queries), place);
    const std::vector<int64_t> of_keys{kBatch, kHeads, keys, kDims};
    const std::vector<Tensor> operands = {
        tensor(q_at.data(), Dtype::u8, {kBatch, kHeads, queries, kDims}),
        tensor(k_at.data(), Dtype::u8, of_keys),
        floats ? tensor(wide_at.data(), Dtype::f32, of_keys)
               : tensor(v_at.data(), Dtype::u8, of_keys),
        tensor(lengths_at.data(), Dtype::i64, {kBatch}),
        tensor(out.data(), Dtype::u8, {kBatch, queries, kHeads, kDims})};
    CHECK(run_step("window_sparse_attention_int8", operands, fields).fault == Fault::none);
    return out.values();
  };
  std::vector<uint8_t> expected;
  as_scalar([&] { expected = run_at(Place::heap); });
  for_every_setting("int8 attention of " + std::to_string(queries) + " and " + std::to_string(keys),
                    [&](Place place) { CHECK(run_at(place) == expected); });
}

}  // namespace

TEST(step_window_sparse_attention_int8) {
  for (const int64_t queries : {1, 15, 33})
    for (const bool floats : {false, true}) {
      compare(queries, queries, {queries % 2 != 0, 2, {json::List{4, 8}, json::List{}}}, floats);
      for (const int64_t keys : {0, 1, 16, 40})
        compare(queries, keys, {false, 1 << 30, {json::List{}}}, floats);
    }
}

}  // namespace fastrec::tests
