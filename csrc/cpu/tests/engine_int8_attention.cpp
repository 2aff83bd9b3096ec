// The step window_sparse_attention_int8 on operands that begin or end at a guard page: all
// instruction sets give the bits of the scalar kernels.
#include "engine/steps.h"
#include "engine_plans.h"

namespace fastrec::tests {
namespace {

void compare(int64_t queries, int64_t keys, const std::vector<int64_t>& pattern, bool floats) {
  constexpr int64_t kBatch = 2, kHeads = 2, kDims = 9;
  Random random(5);
  const auto count = [&](int64_t rows) { return kBatch * kHeads * rows * kDims; };
  const auto q = random.integers<uint8_t>(count(queries), 0, 255);
  const auto k = random.integers<uint8_t>(count(keys), 0, 255);
  const auto v = random.integers<uint8_t>(count(keys), 0, 255);
  const auto wide = random.floats(count(keys), 3.0f);
  const std::vector<int64_t> lengths{keys, keys / 3};
  // Whether there are lengths, causal, window, lists, two zero points, then the distances.
  std::vector<int64_t> integers{1, pattern[0], pattern[1], pattern[2], 128, 90};
  integers.insert(integers.end(), pattern.begin() + 3, pattern.end());

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
    Step step = make_step("window_sparse_attention_int8", {}, integers, {1e-4, 0.02, 0.03});
    step.operands.resize(operands.size());
    step.prepared = find_kind(step.kind)->prepare(step, operands.data());
    CHECK(step.run(step, operands.data()).fault == Fault::none);
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
      compare(queries, queries, {queries % 2, 2, 2, 2, 4, 8, 0}, floats);
      for (const int64_t keys : {0, 1, 16, 40}) compare(queries, keys, {0, 1 << 30, 1, 0}, floats);
    }
}

}  // namespace fastrec::tests
