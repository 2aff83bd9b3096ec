// The plan executor: one small model on everything that a call may meet.
#include <algorithm>
#include <atomic>
#include <cmath>
#include <new>
#include <thread>

#include "check.h"
#include "engine/executor.h"
#include "engine_plans.h"
#include "parallel.h"

#if !defined(__SANITIZE_ADDRESS__) && !defined(__SANITIZE_THREAD__)
#define FASTREC_COUNTS_ALLOCATIONS
namespace {
thread_local int64_t allocations = 0;
}
// Not inlined: gcc would take free() of a new block for a mistake.
__attribute__((noinline)) void* operator new(size_t bytes) {
  ++allocations;
  if (void* memory = std::malloc(std::max<size_t>(bytes, 1))) return memory;
  throw std::bad_alloc();
}
__attribute__((noinline)) void operator delete(void* memory) noexcept { std::free(memory); }
__attribute__((noinline)) void operator delete(void* memory, size_t) noexcept { std::free(memory); }
#endif

namespace fastrec::tests {
namespace {

constexpr int64_t kRows = 13, kHeads = 2, kHeadDim = 9, kDims = kHeads * kHeadDim;

enum Input { ids, noise, lengths, kInputs };
enum Constant { table, scale, weight, bias, merged, merged_bias, square, kConstants };
enum StepAt { gather, map, norm, project, attend, linear, last };

json::Object program(const char* text) { return {{"program", json::parse(text)}}; }
json::Object norm_fields(double y_scale, int64_t y_zero_point) {
  return {{"eps", 1e-5}, {"y_scale", y_scale}, {"y_zero_point", y_zero_point}, {"y_tiles", false}};
}

// gather -> * scale + position / 100 + noise -> layer_norm -> linear to q, k, v -> attention ->
// linear with gelu -> layer_norm of the sum with the first map's result.
struct Model {
  explicit Model(Place place) {
    Random random(37);
    const int64_t counts[] = {kRows * kDims,     kDims,     kDims,        kDims,
                              3 * kDims * kDims, 3 * kDims, kDims * kDims};
    for (const int64_t count : counts)
      constants.push_back(std::make_unique<Buffer<float>>(random.floats(count, 0.5f), place));
  }

  // `apart`: whether users may run on threads of their own, and so may the rows of one.
  Plan plan(bool quantised, bool apart = true) const {
    Plan plan;
    if (apart) {
      plan.users = kBatch;
      plan.rows = {L};
      plan.groups = {{norm, project + 1, kLength}};
    }
    for (const auto& values : constants)
      plan.constants.push_back(reinterpret_cast<const std::byte*>(values->data()));
    const int64_t bytes = kDims * 4;
    plan.slots = {{{extent(bytes, 1, 1)}},
                  {{extent(bytes, 1, 1)}},
                  {{extent(bytes, 1, 1), extent(3 * bytes, 1, 1)}}};
    const Extent D = extent(kDims), D3 = extent(3 * kDims), one = extent(1), zero = extent(0);
    const auto rows = [&](Space space, int index) {
      return dense(space, index, Dtype::f32, {B, L, D});
    };
    const auto constant = [&](Constant which, const std::vector<Extent>& sizes) {
      return dense(Space::constant, which, Dtype::f32, sizes);
    };
    const auto input = [&](Input which, Dtype dtype, const std::vector<Extent>& sizes) {
      return dense(Space::input, which, dtype, sizes);
    };
    const auto slot = [&](int index) { return rows(Space::arena, index); };
    const auto affine = [&](Constant which) { return constant(which, {D}); };
    const Operand none = Operand::none();
    const Operand ids_in = input(ids, Dtype::i64, {B, L});

    plan.steps.push_back(
        make_step("gather", {ids_in, constant(table, {extent(kRows), D}), none, slot(0)}));

    Operand per_channel = slot(0), per_row = slot(0);
    per_channel.space = Space::constant;
    per_channel.index = scale;
    per_channel.strides = {zero, zero, one};
    per_row.space = Space::input;
    per_row.index = noise;
    per_row.strides = {L, one, zero};
    plan.steps.push_back(
        make_step("map", {slot(0), per_channel, per_row, slot(1)},
                  program(R"([["mul_f32", 0, 1], ["index", 1], ["to_f32", 4], ["number", 0.01],
                              ["mul_f32", 5, 6], ["add_f32", 3, 7], ["add_f32", 8, 2]])")));
    plan.steps.push_back(make_step("layer_norm",
                                   {slot(1), none, affine(weight), affine(bias), none, slot(0)},
                                   norm_fields(1.0, 0)));
    plan.steps.push_back(make_step("linear",
                                   {slot(0), constant(merged, {D3, D}), constant(merged_bias, {D3}),
                                    dense(Space::arena, 2, Dtype::f32, {B, L, D3})},
                                   {{"activation", "none"}}));
    std::vector<Operand> heads;
    for (int64_t part = 0; part < 3; ++part)
      heads.push_back({Space::arena,
                       2,
                       Dtype::f32,
                       part * kDims,
                       {B, extent(kHeads), L, extent(kHeadDim)},
                       {extent(3 * kDims, 0, 1), extent(kHeadDim), D3, one}});
    heads.push_back(input(lengths, Dtype::i64, {B}));
    heads.push_back(dense(Space::arena, 0, Dtype::f32, {B, L, extent(kHeads), extent(kHeadDim)}));
    plan.steps.push_back(make_step("attention", heads, {{"scale", 1.0 / 3.0}}));
    plan.steps.push_back(make_step("linear", {slot(0), constant(square, {D, D}), none, slot(2)},
                                   {{"activation", "gelu"}}));
    Operand result = rows(Space::output, 0);
    if (quantised) result.dtype = Dtype::u8;
    plan.steps.push_back(make_step("layer_norm",
                                   {slot(2), slot(1), affine(weight), affine(bias), none, result},
                                   norm_fields(1.0 / 32, 128)));
    return plan;
  }

  std::vector<std::unique_ptr<Buffer<float>>> constants;
};

struct Request {
  Request(int64_t batch, int64_t length, uint64_t seed) : batch(batch), length(length) {
    Random random(seed);
    id = random.integers<int64_t>(batch * length, 0, kRows - 1);
    noises = random.floats(batch * length, 0.1f);
    valid = random.integers<int64_t>(batch, 0, length);  // 0 stands for all
  }
  int64_t count() const { return batch * length * kDims; }

  int64_t batch, length;
  std::vector<int64_t> id, valid;
  std::vector<float> noises;
};

struct Answer {
  Status status;
  std::vector<uint8_t> bytes;
};

// A request in buffers of its own.
struct Placed {
  Placed(const Request& request, bool quantised, Place place)
      : symbols{request.batch, request.length},
        id(request.id, place),
        valid(request.valid, place),
        noises(request.noises, place),
        out(static_cast<size_t>(request.count()) * (quantised ? 1 : 4), place),
        inputs{reinterpret_cast<const std::byte*>(id.data()),
               reinterpret_cast<const std::byte*>(noises.data()),
               reinterpret_cast<const std::byte*>(valid.data())} {}
  Status run(Executor& executor, int64_t* step_ns = nullptr) {
    std::byte* const outputs[] = {reinterpret_cast<std::byte*>(out.data())};
    return executor.run(symbols, inputs, outputs, step_ns);
  }

  Symbols symbols;
  Buffer<int64_t> id, valid;
  Buffer<float> noises;
  Buffer<uint8_t> out;
  const std::byte* inputs[kInputs];
};

Answer answer(Executor& executor, const Request& request, bool quantised, Place place) {
  Placed placed(request, quantised, place);
  const Status status = placed.run(executor);
  return {status, placed.out.values()};
}

std::vector<float> floats_of(const std::vector<uint8_t>& bytes) {
  std::vector<float> values(bytes.size() / 4);
  if (!values.empty()) std::memcpy(values.data(), bytes.data(), bytes.size());
  return values;
}

void check_answer(const Answer& actual, const Answer& expected, bool quantised) {
  CHECK(actual.status.fault == Fault::none && expected.status.fault == Fault::none);
  // Results lie within a few units; the errors of six steps stay far below this (each kernel's own
  // test holds it to a derived bound), and any wrong row, head or slot far above. A rounding to u8
  // may fall to either side.
  if (!quantised) {
    CHECK(worst_error(floats_of(actual.bytes), floats_of(expected.bytes), 1e-4, 1e-4) <= 1);
    return;
  }
  CHECK(actual.bytes.size() == expected.bytes.size());
  for (size_t i = 0; i < actual.bytes.size(); ++i)
    CHECK(std::abs(actual.bytes[i] - expected.bytes[i]) <= 1);
}

void check_fault(const Status& status, Fault fault, int step, int64_t value) {
  CHECK(status.fault == fault && status.step == step && status.value == value);
}

}  // namespace

TEST(engine_agrees_within_bounds) {
  for (const bool quantised : {false, true}) {
    std::vector<Request> requests;
    // Growing and shrinking: a larger arena replaces a smaller one, a smaller call uses a larger.
    for (const auto& [batch, length] : std::vector<std::pair<int64_t, int64_t>>{{1, 1},
                                                                                {2, 7},
                                                                                {3, 64},
                                                                                {0, 5},
                                                                                {1, 15},
                                                                                {1, 16},
                                                                                {4, 33},
                                                                                {1, 1},
                                                                                {9, 130},
                                                                                {1, 33},
                                                                                {2, 7},
                                                                                {1, 200}})
      requests.emplace_back(batch, length, 41 + requests.size());
    std::vector<Answer> expected;
    as_scalar([&] {
      const Model model(Place::heap);
      Executor executor(model.plan(quantised));
      for (const Request& request : requests)
        expected.push_back(answer(executor, request, quantised, Place::heap));
    });
    for_every_setting(quantised ? "u8" : "f32", [&](Place place) {
      const Model model(place);
      for (const bool apart : {false, true}) {
        Executor executor(model.plan(quantised, apart));
        for (size_t r = 0; r < requests.size(); ++r)
          check_answer(answer(executor, requests[r], quantised, place), expected[r], quantised);
      }
    });
  }
}

TEST(engine_serves_concurrent_callers) {
  constexpr int kCallers = 4, kRounds = 24;
  for_every_setting("callers", [&](Place place) {
    const int threads = exchange_call_threads(0);
    exchange_call_threads(threads);
    const Model model(place);
    Executor executor(model.plan(false));
    std::vector<Request> requests;
    for (const auto& [batch, length] :
         std::vector<std::pair<int64_t, int64_t>>{{1, 50}, {2, 17}, {4, 40}, {8, 64}})
      requests.emplace_back(batch, length, 53 + requests.size());
    std::vector<Answer> alone;
    for (const Request& request : requests)
      alone.push_back(answer(executor, request, false, place));
    std::vector<std::thread> callers;
    for (int i = 0; i < kCallers; ++i)
      callers.emplace_back([&, i] {
        exchange_call_threads(threads);
        Request wrong = requests[i];
        wrong.id.back() = kRows + i;
        for (int round = 0; round < kRounds; ++round) {
          if (round % 4 == i) {  // one caller's fault is no other's
            const Answer fault = answer(executor, wrong, false, place);
            check_fault(fault.status, Fault::id_out_of_range, gather, kRows + i);
            continue;
          }
          // Sizes change from round to round, and so does the arena that a caller happens to get.
          const int r = (i + round) % kCallers;
          const Answer got = answer(executor, requests[r], false, place);
          CHECK(got.status.fault == Fault::none && got.bytes == alone[r].bytes);
        }
      });
    for (std::thread& caller : callers) caller.join();
  });
}

TEST(engine_keeps_more_arenas_than_it_has_room_for) {
  // More callers at once than arenas are kept: each waits in its call until all have begun.
  constexpr int kCallers = 70;
  static std::atomic<int> inside;
  inside = 0;
  const Model model(Place::heap);
  Plan plan = model.plan(false);
  Kind waiting = *plan.steps[gather].kind;
  waiting.run = [](const void*, Tensors, const void*) {
    for (++inside; inside < kCallers;) std::this_thread::yield();
    return Status{};
  };
  Step meeting = plan.steps[gather];
  meeting.kind = &waiting;
  plan.steps.insert(plan.steps.begin(), meeting);
  Executor executor(std::move(plan));
  std::vector<std::thread> callers;
  for (int i = 0; i < kCallers; ++i)
    callers.emplace_back([&, i] {
      const Request request(1, 1 + i % 5, 61);
      CHECK(answer(executor, request, false, Place::heap).status.fault == Fault::none);
    });
  for (std::thread& caller : callers) caller.join();
}

TEST(engine_is_usable_after_a_fault) {
  const Request good(2, 9, 67);
  for_every_setting("faults", [&](Place place) {
    const Model model(place);
    Executor executor(model.plan(true));
    const Answer expected = answer(executor, good, true, place);
    const auto check_usable = [&] {
      const Answer again = answer(executor, good, true, place);
      CHECK(again.status.fault == Fault::none && again.bytes == expected.bytes);
    };
    for (const int64_t id : {int64_t{-1}, kRows, INT64_MIN, INT64_MAX}) {
      Request bad = good;
      bad.id[10] = id;
      check_fault(answer(executor, bad, true, place).status, Fault::id_out_of_range, gather, id);
      check_usable();
    }
    for (const int64_t length : {int64_t{-1}, int64_t{10}, INT64_MAX}) {
      Request bad = good;
      bad.valid[1] = length;
      check_fault(answer(executor, bad, true, place).status, Fault::id_out_of_range, attend,
                  length);
      check_usable();
    }
    Request bad = good;
    bad.noises[3] = NAN;
    check_fault(answer(executor, bad, true, place).status, Fault::not_a_number, last, 0);
    check_usable();
  });
}

TEST(engine_times_each_step) {
  const Model model(Place::heap);
  Executor executor(model.plan(false));
  Placed placed(Request(2, 9, 71), false, Place::heap);
  Buffer<int64_t> step_ns(last + 1, Place::before_guard);
  CHECK(placed.run(executor, step_ns.data()).fault == Fault::none);
  for (const int64_t ns : step_ns.values()) CHECK(ns >= 0);
}

#if defined(FASTREC_COUNTS_ALLOCATIONS)
TEST(engine_allocates_nothing_for_a_size_that_it_has_seen) {
  for_every_setting("allocations", [](Place place) {
    const Model model(place);
    // Users apart need an arena for each thread that happens to come.
    Executor executor(model.plan(false, false));
    Placed large(Request(8, 64, 73), false, place), small(Request(1, 3, 79), false, place);
    CHECK(large.run(executor).fault == Fault::none);
    const int64_t before = allocations;
    for (Placed* placed : {&large, &small, &large})
      CHECK(placed->run(executor).fault == Fault::none);
    CHECK(allocations == before);
  });
}

TEST(engine_keeps_its_arena_where_memory_runs_out) {
  const Model model(Place::heap);
  Executor executor(model.plan(false, false));
  Placed placed(Request(1, 3, 79), false, Place::heap);
  CHECK(placed.run(executor).fault == Fault::none);
  bool refused = false;
  try {  // petabytes: no step is run
    executor.run({int64_t{1} << 44, 1}, placed.inputs, nullptr);
  } catch (const std::bad_alloc&) {
    refused = true;
  }
  CHECK(refused);
  const int64_t before = allocations;
  CHECK(placed.run(executor).fault == Fault::none);
  CHECK(allocations == before);
}
#endif

}  // namespace fastrec::tests
