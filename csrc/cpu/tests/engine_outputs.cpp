// A plan with several outputs, tiles between its layers, and outputs that later steps read.
#include <iterator>
#include <memory>
#include <thread>

#include "check.h"
#include "engine/executor.h"
#include "engine_plans.h"
#include "parallel.h"

namespace fastrec::tests {
namespace {

constexpr int64_t kWidth = 40, kHidden = 70, kScores = 33;

enum Weighted { values, groups, starts, scales, sums, biases, kParts };
enum Output { scores, total, shares, codes, kOutputs };

// An int8 layer's constants, as random as its seed.
struct Int8Layer {
  Int8Layer(int64_t outputs, int64_t inputs, uint64_t seed, Place place) {
    Random random(seed);
    const int64_t panels = (outputs + 31) / 32, all = (inputs + 3) / 4;
    std::vector<int8_t> value;
    std::vector<int32_t> index, start = {0}, sum(static_cast<size_t>(outputs), 0);
    for (int64_t p = 0; p < panels; ++p) {
      for (int64_t g = p % 2; g < all; g += 1 + g % 2) {  // some groups are left out
        index.push_back(static_cast<int32_t>(g));
        auto group = random.integers<int8_t>(128, -128, 127);
        for (int i = 0; i < 128; ++i) {
          const int64_t n = p * 32 + i / 4;
          if (n >= outputs || g * 4 + i % 4 >= inputs) group[i] = 0;
          if (n < outputs) sum[n] += group[i];
        }
        value.insert(value.end(), group.begin(), group.end());
      }
      start.push_back(static_cast<int32_t>(index.size()));
    }
    add(value, place);
    add(index, place);
    add(start, place);
    add(random.floats(outputs, 0.01f), place);
    add(sum, place);
    add(random.floats(outputs), place);
    sizes = {{static_cast<int64_t>(index.size()), 128},
             {static_cast<int64_t>(index.size())},
             {panels + 1},
             {outputs},
             {outputs},
             {outputs}};
  }

  template <class T>
  void add(const std::vector<T>& from, Place place) {
    const auto* bytes = reinterpret_cast<const uint8_t*>(from.data());
    parts.push_back(std::make_unique<Buffer<uint8_t>>(
        std::vector<uint8_t>(bytes, bytes + from.size() * sizeof(T)), place));
  }

  std::vector<std::unique_ptr<Buffer<uint8_t>>> parts;
  std::vector<std::vector<int64_t>> sizes;
};

// total = x + residual; hidden = relu(int8(norm(total))); scores = int8(hidden);
// shares = softmax(scores); codes = int8(total) as u8.
struct Branches {
  explicit Branches(Place place)
      : first(kHidden, kWidth, 29, place),
        second(kScores, kHidden, 31, place),
        third(kScores, kWidth, 37, place),
        weight(Random(41).floats(kWidth), place),
        bias(Random(43).floats(kWidth), place) {}

  Plan plan(bool tiles, bool apart) const {
    Plan plan;
    if (apart) {
      plan.users = kBatch;
      plan.rows = {L};
    }
    const Int8Layer* layers[] = {&first, &second, &third};
    for (const Int8Layer* layer : layers)
      for (const auto& part : layer->parts)
        plan.constants.push_back(reinterpret_cast<const std::byte*>(part->data()));
    for (const Buffer<float>* affine : {&weight, &bias})
      plan.constants.push_back(reinterpret_cast<const std::byte*>(affine->data()));
    const auto room = [](int64_t width) { return extent(2 * ((width + 31) / 32 * 32), 1, 1); };
    plan.slots = {{{room(kWidth)}}, {{room(kHidden)}}};
    const auto rows = [](Space space, int index, Dtype dtype, int64_t width) {
      return dense(space, index, dtype, {B, L, extent(width)});
    };
    const auto layer = [&](int which, int64_t outputs, int64_t inputs, const Operand& x,
                           const Operand& y, const char* activation, bool x_tiles, bool y_tiles) {
      static constexpr Dtype kDtypes[] = {Dtype::s8,  Dtype::i32, Dtype::i32,
                                          Dtype::f32, Dtype::i32, Dtype::f32};
      std::vector<Operand> operands = {x};
      for (int p = 0; p < kParts; ++p) {
        std::vector<Extent> sizes;
        for (const int64_t size : layers[which]->sizes[p]) sizes.push_back(extent(size));
        operands.push_back(dense(Space::constant, which * kParts + p, kDtypes[p], sizes));
      }
      operands.push_back(y);
      plan.steps.push_back(make_step("linear_int8", operands,
                                     {{"outputs", outputs},
                                      {"inputs", inputs},
                                      {"x_scale", 0.03},
                                      {"x_zero_point", 113},
                                      {"activation", activation},
                                      {"y_scale", 0.05},
                                      {"y_zero_point", 101},
                                      {"x_tiles", x_tiles},
                                      {"y_tiles", y_tiles}}));
    };
    const auto affine = [&](int which) {
      return dense(Space::constant, 3 * kParts + which, Dtype::f32, {extent(kWidth)});
    };
    const Operand sum = rows(Space::output, total, Dtype::f32, kWidth);
    const Operand normed = rows(Space::arena, 0, Dtype::u8, kWidth);
    const Operand hidden = rows(Space::arena, 1, Dtype::u8, kHidden);
    const Operand score = rows(Space::output, scores, Dtype::f32, kScores);
    plan.steps.push_back(
        make_step("layer_norm",
                  {rows(Space::input, 0, Dtype::f32, kWidth),
                   rows(Space::input, 1, Dtype::f32, kWidth), affine(0), affine(1), sum, normed},
                  {{"eps", 1e-5}, {"y_scale", 0.03}, {"y_zero_point", 113}, {"y_tiles", tiles}}));
    layer(0, kHidden, kWidth, normed, hidden, "relu", tiles, tiles);
    layer(1, kScores, kHidden, hidden, score, "none", tiles, false);
    plan.steps.push_back(
        make_step("softmax", {score, rows(Space::output, shares, Dtype::f32, kScores)}));
    layer(2, kScores, kWidth, sum, rows(Space::output, codes, Dtype::u8, kScores), "gelu", false,
          false);
    return plan;
  }

  Int8Layer first, second, third;
  Buffer<float> weight, bias;
};

struct Answers {
  std::vector<uint8_t> bytes[kOutputs];
};

std::vector<float> floats_of(const std::vector<uint8_t>& bytes) {
  std::vector<float> values(bytes.size() / 4);
  if (!values.empty()) std::memcpy(values.data(), bytes.data(), bytes.size());
  return values;
}

// The same bits, but for the softmax: instruction sets have exponentials of their own.
bool agree(const Answers& actual, const Answers& expected) {
  for (const Output o : {scores, total, codes})
    if (actual.bytes[o] != expected.bytes[o]) return false;
  const auto ours = floats_of(actual.bytes[shares]), theirs = floats_of(expected.bytes[shares]);
  return worst_error(ours, theirs, 1e-30, 1e-5) <= 1;
}

// Outputs without a byte behind them, some of which steps read again.
Answers answers(Executor& executor, int64_t batch, int64_t length, Place place) {
  Random random(47 + static_cast<uint64_t>(batch * 100 + length));
  const int64_t rows = batch * length;
  const Buffer<float> x(random.floats(rows * kWidth, 3.0f), place),
      residual(random.floats(rows * kWidth, 3.0f), place);
  Buffer<uint8_t> score(rows * kScores * 4, place), sum(rows * kWidth * 4, place),
      share(rows * kScores * 4, place), code(rows * kScores, place);
  const std::byte* const inputs[] = {reinterpret_cast<const std::byte*>(x.data()),
                                     reinterpret_cast<const std::byte*>(residual.data())};
  std::byte* outputs[kOutputs];
  Buffer<uint8_t>* const made[] = {&score, &sum, &share, &code};
  for (int o = 0; o < kOutputs; ++o) outputs[o] = reinterpret_cast<std::byte*>(made[o]->data());
  CHECK(executor.run({batch, length}, inputs, outputs).fault == Fault::none);
  Answers answers;
  for (int o = 0; o < kOutputs; ++o) answers.bytes[o] = made[o]->values();
  return answers;
}

constexpr std::pair<int64_t, int64_t> kRequests[] = {{1, 1}, {2, 7}, {0, 3}, {1, 33}, {5, 40}};

// Rows, on the scalar kernels.
std::vector<Answers> expected_answers() {
  std::vector<Answers> expected;
  as_scalar([&] {
    const Branches model(Place::heap);
    Executor executor(model.plan(false, false));
    for (const auto& [batch, length] : kRequests)
      expected.push_back(answers(executor, batch, length, Place::heap));
  });
  return expected;
}

}  // namespace

TEST(engine_writes_several_outputs_and_reads_them_again) {
  const auto expected = expected_answers();
  for (const bool tiles : {false, true})
    for_every_setting(tiles ? "outputs, tiles" : "outputs, rows", [&](Place place) {
      const Branches model(place);
      for (const bool apart : {false, true}) {
        Executor executor(model.plan(tiles, apart));
        for (size_t r = 0; r < std::size(kRequests); ++r)
          CHECK(agree(answers(executor, kRequests[r].first, kRequests[r].second, place),
                      expected[r]));
      }
    });
}

TEST(engine_serves_concurrent_callers_of_several_outputs) {
  constexpr int kCallers = 4, kRounds = 10;
  const auto expected = expected_answers();
  for_every_setting("callers of outputs", [&](Place place) {
    const int threads = exchange_call_threads(0);
    exchange_call_threads(threads);
    const Branches model(place);
    Executor executor(model.plan(true, true));
    std::vector<std::thread> callers;
    for (int i = 0; i < kCallers; ++i)
      callers.emplace_back([&, i] {
        exchange_call_threads(threads);
        for (int round = 0; round < kRounds; ++round) {
          const size_t r = static_cast<size_t>(i + round) % std::size(kRequests);
          CHECK(agree(answers(executor, kRequests[r].first, kRequests[r].second, place),
                      expected[r]));
        }
      });
    for (std::thread& caller : callers) caller.join();
  });
}

}  // namespace fastrec::tests
