// The C interface: its results are the engine's, its errors are codes, nothing is thrown.
#include <cmath>
#include <limits>

#include "engine/fastrec.h"
#include "engine_file_samples.h"

namespace fastrec::tests {
namespace {

struct Opened {
  explicit Opened(const FileParts& parts) : file(engine_file(parts)) {
    CHECK(fastrec_open(file.path().c_str(), FASTREC_COPY, &engine, &error) == FASTREC_OK);
  }
  Opened(const Opened&) = delete;
  ~Opened() { fastrec_close(engine); }

  TemporaryFile file;
  fastrec_engine* engine = nullptr;
  fastrec_error error;
};

// An array of int64 with its memory.
struct Ids {
  Ids(std::vector<int64_t> sizes, std::vector<int64_t> values)
      : sizes(std::move(sizes)), values(std::move(values)) {}
  operator fastrec_array() const {
    return {values.data(), FASTREC_INT64, static_cast<int32_t>(sizes.size()), sizes.data()};
  }

  std::vector<int64_t> sizes, values;
};

bool says(const fastrec_error& error, const char* part) {
  return std::strstr(error.message, part) != nullptr;
}

const Ids kHistory({2, 3}, {1, 2, 3, 4, 5, 6}), kCandidates({2, 2}, {6, 0, 3, 2});

std::vector<float> output_of(const fastrec_state* state) {
  const float* output = nullptr;
  int64_t sizes[FASTREC_MAX_DIMS];
  int dims = 0;
  CHECK(fastrec_state_output(state, &output, sizes, &dims, nullptr) == FASTREC_OK);
  int64_t count = 1;
  for (int d = 0; d < dims; ++d) count *= sizes[d];
  return {output, output + count};
}

}  // namespace

TEST(c_inputs_are_described) {
  Opened opened(small_ranker());
  CHECK(fastrec_abi_version() == FASTREC_ABI_VERSION);
  CHECK(fastrec_inputs(opened.engine) == 2);
  fastrec_input input;
  CHECK(fastrec_describe(opened.engine, 0, &input, &opened.error) == FASTREC_OK);
  CHECK(std::string(input.name) == "item" && input.dtype == FASTREC_INT64 && input.dims == 2);
  CHECK(input.sizes[1] == -1 && std::string(input.symbols[1]) == "L");
  CHECK(input.low[1] == 1 && input.high[1] == 16);
  CHECK(input.high[0] == std::numeric_limits<int64_t>::max());
  CHECK(input.rows == 7 && input.rows_symbol == nullptr);
  CHECK(std::strstr(fastrec_header(opened.engine), "\"precision\":\"fp32\""));
  Opened sequence(small_sequence());
  CHECK(fastrec_describe(sequence.engine, 1, &input, nullptr) == FASTREC_OK);
  CHECK(input.rows == -1 && std::string(input.rows_symbol) == "L");
}

TEST(c_encode_and_score_are_the_whole_call_to_the_bit) {
  Opened opened(small_ranker());
  const fastrec_array inputs[] = {kHistory, kCandidates};
  int64_t sizes[FASTREC_MAX_DIMS];
  int dims = 0;
  fastrec_error& error = opened.error;
  CHECK(!fastrec_output_sizes(opened.engine, inputs, 2, sizes, &dims, &error));
  CHECK(dims == 3 && sizes[0] == 2 && sizes[1] == 2 && sizes[2] == 1);
  float whole[4], scored[4];
  CHECK(!fastrec_run(opened.engine, inputs, 2, whole, 4, &error));
  CHECK(whole[0] != whole[1]);
  fastrec_state* state = nullptr;
  CHECK(!fastrec_encode(opened.engine, inputs, 1, 0, &state, &error));
  CHECK(fastrec_state_bytes(state) > 0);
  CHECK(!fastrec_score(opened.engine, state, inputs + 1, 1, scored, 4, &error));
  CHECK(std::memcmp(whole, scored, sizeof(whole)) == 0);
  // Any number of candidates, on any number of threads.
  const Ids one({2, 1}, {6, 3});
  const fastrec_array fewer = one;
  CHECK(!fastrec_set_threads(opened.engine, 3, &error));
  CHECK(!fastrec_score(opened.engine, state, &fewer, 1, scored, 2, &error));
  CHECK(scored[0] == whole[0] && scored[1] == whole[2]);
  fastrec_state_free(state);
}

TEST(c_append_is_encode_of_the_whole_within_rounding) {
  Opened opened(small_sequence());
  fastrec_error& error = opened.error;
  // The second user has two events and a padding.
  const Ids length({2}, {3, 2});
  const fastrec_array begun[] = {kHistory, length};
  fastrec_state *state = nullptr, *next = nullptr, *whole = nullptr;
  CHECK(!fastrec_encode(opened.engine, begun, 2, FASTREC_APPENDABLE, &state, &error));
  const std::vector<float> before = output_of(state);
  const Ids events({2, 2}, {0, 1, 2, 3});
  const fastrec_array more = events;
  CHECK(!fastrec_append(opened.engine, state, &more, 1, &next, &error));
  const Ids all({2, 5}, {1, 2, 3, 0, 1, 4, 5, 2, 3, 0}), lengths({2}, {5, 4});
  const fastrec_array history[] = {all, lengths};
  CHECK(!fastrec_encode(opened.engine, history, 2, 0, &whole, &error));
  const std::vector<float> made = output_of(next), expected = output_of(whole);
  CHECK(made.size() == expected.size());
  // 5 rows of 4; the last of the second user is padding.
  for (size_t i = 0; i < 36; ++i) CHECK(std::abs(made[i] - expected[i]) <= 1e-5);
  CHECK(output_of(state) == before);
  // A state outlives its engine.
  fastrec_state_free(state);
  fastrec_state_free(whole);
  fastrec_close(opened.engine);
  opened.engine = nullptr;
  CHECK(output_of(next) == made);
  CHECK(fastrec_append(opened.engine, next, &more, 1, &whole, &error) == FASTREC_ARGUMENT);
  fastrec_state_free(next);
}

TEST(c_mistakes_are_codes) {
  Opened opened(small_ranker());
  fastrec_engine* const engine = opened.engine;
  fastrec_error& error = opened.error;
  const fastrec_array good[] = {kHistory, kCandidates};
  float scores[4];
  const auto run = [&](fastrec_array history, fastrec_array candidates) {
    const fastrec_array inputs[] = {history, candidates};
    const int code = fastrec_run(engine, inputs, 2, scores, 4, &error);
    CHECK(error.code == code && (code == 0) == (error.message[0] == '\0'));
    return code;
  };
  const auto changed = [&](auto&& change) {
    fastrec_array array = kHistory;
    change(array);
    return run(array, kCandidates);
  };
  CHECK(run(kHistory, kCandidates) == FASTREC_OK);
  CHECK(changed([](fastrec_array& a) { a.data = nullptr; }) == FASTREC_ARGUMENT);
  CHECK(changed([](fastrec_array& a) { a.sizes = nullptr; }) == FASTREC_ARGUMENT);
  CHECK(changed([](fastrec_array& a) { a.dims = -1; }) == FASTREC_ARGUMENT);
  CHECK(changed([](fastrec_array& a) { a.dims = 7; }) == FASTREC_ARGUMENT);
  CHECK(changed([](fastrec_array& a) { a.dtype = 99; }) == FASTREC_ARGUMENT);
  CHECK(changed([](fastrec_array& a) { a.dtype = FASTREC_FLOAT32; }) == FASTREC_SHAPE);
  CHECK(says(error, "item: expected int64 [B (1 or more), L (1..16)], got float32 [2, 3]"));
  CHECK(changed([](fastrec_array& a) { a.dims = 1; }) == FASTREC_SHAPE);
  const int64_t negative[] = {-1, 3}, huge[] = {int64_t{1} << 40, int64_t{1} << 40},
                long_[] = {1, 17};
  for (const int64_t* sizes : {negative, huge, long_})
    CHECK(changed([&](fastrec_array& a) { a.sizes = sizes; }) == FASTREC_SHAPE);
  CHECK(run(kHistory, Ids({1, 4}, {0, 1, 2, 3})) == FASTREC_SHAPE);  // another number of users
  for (const int64_t id : {int64_t{7}, int64_t{-1}, std::numeric_limits<int64_t>::min()}) {
    CHECK(run(kHistory, Ids({2, 2}, {6, 0, 3, id})) == FASTREC_ID_RANGE);
    CHECK(says(error, "candidate: expected values in 0..6, got one outside"));
  }
  CHECK(fastrec_run(engine, good, 1, scores, 4, &error) == FASTREC_ARGUMENT);
  CHECK(says(error, "expected 2 inputs, got 1"));
  CHECK(fastrec_run(engine, nullptr, 2, scores, 4, &error) == FASTREC_ARGUMENT);
  CHECK(fastrec_run(engine, good, 2, scores, 3, &error) == FASTREC_ARGUMENT);
  CHECK(says(error, "room for 4 floats, got 3"));
  CHECK(fastrec_run(engine, good, 2, nullptr, 4, &error) == FASTREC_ARGUMENT);
  CHECK(fastrec_run(nullptr, good, 2, scores, 4, &error) == FASTREC_ARGUMENT);
  CHECK(fastrec_run(nullptr, good, 2, scores, 4, nullptr) == FASTREC_ARGUMENT);
  CHECK(fastrec_output_sizes(engine, good, 2, nullptr, nullptr, &error) == FASTREC_ARGUMENT);
  for (const int threads : {0, -1, 1025})
    CHECK(fastrec_set_threads(engine, threads, &error) == FASTREC_ARGUMENT);
  fastrec_input input;
  for (const int index : {-1, 2})
    CHECK(fastrec_describe(engine, index, &input, &error) == FASTREC_ARGUMENT);
  CHECK(fastrec_describe(engine, 0, nullptr, &error) == FASTREC_ARGUMENT);
  CHECK(fastrec_inputs(nullptr) == 0 && fastrec_header(nullptr)[0] == '\0');
  fastrec_close(nullptr);
  fastrec_state_free(nullptr);
  CHECK(fastrec_state_bytes(nullptr) == 0);
  // An engine goes on after errors.
  CHECK(run(kHistory, kCandidates) == FASTREC_OK);
}

TEST(c_states_are_held_to_what_they_are_of) {
  Opened ranker(small_ranker()), other(small_ranker()), sequence(small_sequence());
  fastrec_error& error = ranker.error;
  const fastrec_array history = kHistory, candidates = kCandidates;
  fastrec_state *state = nullptr, *made = nullptr;
  CHECK(fastrec_encode(ranker.engine, &history, 1, 8, &state, &error) == FASTREC_ARGUMENT);
  CHECK(fastrec_encode(ranker.engine, &history, 1, 0, nullptr, &error) == FASTREC_ARGUMENT);
  CHECK(fastrec_encode(ranker.engine, &history, 0, 0, &state, &error) == FASTREC_ARGUMENT);
  // A mean mixes events.
  CHECK(fastrec_encode(ranker.engine, &history, 1, FASTREC_APPENDABLE, &state, &error) ==
        FASTREC_UNSUPPORTED);
  CHECK(says(error, "cannot append events"));
  CHECK(!fastrec_encode(ranker.engine, &history, 1, 0, &state, &error));
  float scores[4];
  CHECK(fastrec_score(other.engine, state, &candidates, 1, scores, 4, &error) == FASTREC_ARGUMENT);
  CHECK(fastrec_score(ranker.engine, nullptr, &candidates, 1, scores, 4, &error) ==
        FASTREC_ARGUMENT);
  const Ids one({1, 2}, {0, 1});
  const fastrec_array alone = one;
  CHECK(fastrec_score(ranker.engine, state, &alone, 1, scores, 4, &error) != FASTREC_OK);
  CHECK(fastrec_append(ranker.engine, state, &history, 1, &made, &error) == FASTREC_ARGUMENT);
  const float* output = nullptr;
  int64_t sizes[FASTREC_MAX_DIMS];
  int dims = 0;
  CHECK(fastrec_state_output(state, &output, sizes, &dims, &error) == FASTREC_UNSUPPORTED);
  fastrec_state_free(state);

  const Ids length({2}, {3, 3}), too_long({2}, {3, 4});
  const fastrec_array both[] = {kHistory, length}, wrong[] = {kHistory, too_long};
  CHECK(fastrec_encode(sequence.engine, wrong, 2, 0, &state, &error) == FASTREC_ID_RANGE);
  CHECK(!fastrec_encode(sequence.engine, both, 2, FASTREC_APPENDABLE, &state, &error));
  CHECK(fastrec_score(sequence.engine, state, &candidates, 1, scores, 4, &error) ==
        FASTREC_UNSUPPORTED);
  const Ids users({1, 1}, {0}), beyond({2, 14}, std::vector<int64_t>(28));
  for (const Ids* events : {&users, &beyond}) {
    const fastrec_array array = *events;
    CHECK(fastrec_append(sequence.engine, state, &array, 1, &made, &error) == FASTREC_SHAPE);
  }
  fastrec_state_free(state);
}

// Files may claim anything of their sizes: what cannot be appended to is refused when a state that
// would be is asked for, and scores as ever.
TEST(c_states_that_count_users_twice_take_no_events) {
  // A row of an event as wide as there are users.
  ModelMaker wide({"B", "L"});
  const View item = wide.input("item", {B, L}, 7), none;
  const View events = wide.arena(Dtype::f32, {B, L, 4}), rows = wide.arena(Dtype::f32, {B, L, B});
  wide.step("gather", {item, wide.floats({7, 4}), none, events});
  View first = events;
  first.sizes = rows.sizes;
  first.strides = {extent(4, 0, 1), 4, 0};
  wide.step("map", {first, rows}, {{"program", json::parse(R"([["neg_f32",0]])")}});

  // As many events as users.
  ModelMaker square({"B"});
  const View ids = square.input("item", {B, B}, 7);
  const View found = square.arena(Dtype::f32, {B, B, 4});
  square.step("gather", {ids, square.floats({7, 4}), none, found});

  const Ids history({2, 2}, {1, 2, 3, 4});
  const fastrec_array given = history;
  for (const FileParts& parts : {wide.made(rows), square.made(found)}) {
    Opened opened(parts);
    fastrec_state* state = nullptr;
    CHECK(fastrec_encode(opened.engine, &given, 1, FASTREC_APPENDABLE, &state, &opened.error) ==
          FASTREC_UNSUPPORTED);
    CHECK(says(opened.error, "append events"));
    CHECK(!fastrec_encode(opened.engine, &given, 1, 0, &state, &opened.error));
    fastrec_state* more = nullptr;
    CHECK(fastrec_append(opened.engine, state, &given, 1, &more, &opened.error) ==
          FASTREC_ARGUMENT);
    fastrec_state_free(state);
  }
}

TEST(c_files_that_are_no_engines_are_codes) {
  fastrec_engine* engine = nullptr;
  fastrec_error error;
  CHECK(fastrec_open("/nonexistent", 0, &engine, &error) == FASTREC_FILE);
  CHECK(fastrec_open(nullptr, 0, &engine, &error) == FASTREC_ARGUMENT);
  const TemporaryFile file(engine_file(small_ranker()));
  CHECK(fastrec_open(file.path().c_str(), 0, nullptr, &error) == FASTREC_ARGUMENT);
  CHECK(fastrec_open(file.path().c_str(), 2, &engine, &error) == FASTREC_ARGUMENT);
  const TemporaryFile cut(engine_file(small_ranker()).substr(0, 999));
  CHECK(fastrec_open(cut.path().c_str(), 0, &engine, &error) == FASTREC_FILE);
  CHECK(engine == nullptr && says(error, "is truncated"));
  CHECK(error.code == FASTREC_FILE);
}

}  // namespace fastrec::tests
