// Users' histories encoded once: scored against candidates, or taken further by new events.
//
//   c++ -std=c++17 user_state.cpp $(fastrec info --c-flags) -o user_state && ./user_state
//   ranker.engine
//
// Of a model with candidates it prints the scores of `encode` and `score`; of one without (SASRec)
// what the model gives after `encode` and an `append` of two events. Each number has the nine
// digits that give back all bits of a float.
#include <fastrec.h>

#include <cinttypes>
#include <cstdio>
#include <map>
#include <memory>
#include <stdexcept>
#include <string>
#include <vector>

namespace {

// A code of the C interface as an exception.
class Error : public std::runtime_error {
 public:
  explicit Error(const fastrec_error& error)
      : std::runtime_error(error.message), code(error.code) {}
  const int code;
};

template <class Function, class... Arguments>
void call(Function function, Arguments... arguments) {
  fastrec_error error;
  if (function(arguments..., &error)) throw Error(error);
}

struct Free {
  void operator()(fastrec_engine* engine) const { fastrec_close(engine); }
  void operator()(fastrec_state* state) const { fastrec_state_free(state); }
};
using Engine = std::unique_ptr<fastrec_engine, Free>;
using State = std::unique_ptr<fastrec_state, Free>;

Engine open(const char* path) {
  fastrec_engine* engine = nullptr;
  call(fastrec_open, path, FASTREC_COPY, &engine);
  return Engine(engine);
}

// An input of int64: here ids that count up, or lengths of whole histories.
struct Input {
  std::string name;
  std::vector<int64_t> values, sizes;
  bool of_candidates = false, of_events = false;

  fastrec_array array() const {
    return {values.data(), FASTREC_INT64, static_cast<int32_t>(sizes.size()), sizes.data()};
  }
};

Input made(const fastrec_engine* engine, int index, std::map<std::string, int64_t>& symbols) {
  fastrec_input about;
  call(fastrec_describe, engine, index, &about);
  if (about.dtype != FASTREC_INT64) throw std::runtime_error("this example fills int64 inputs");
  Input input{about.name, {}, {}};
  int64_t count = 1;
  for (int d = 0; d < about.dims; ++d) {
    const std::string symbol = about.symbols[d] ? about.symbols[d] : "";
    input.of_candidates = input.of_candidates || symbol == "m";
    input.of_events = input.of_events || (d == 1 && symbol == "L");
    input.sizes.push_back(about.symbols[d] ? symbols.at(symbol) : about.sizes[d]);
    count *= input.sizes.back();
  }
  for (int64_t e = 0; e < count; ++e)
    input.values.push_back(about.rows_symbol ? symbols.at(about.rows_symbol)
                           : about.rows > 0  ? (e * 7 + index + 1) % about.rows
                                             : 0);
  return input;
}

void print(const float* values, size_t count) {
  for (size_t i = 0; i < count; ++i) std::printf("%.9g\n", values[i]);
}

void run(const char* path) {
  const Engine engine = open(path);
  std::map<std::string, int64_t> symbols{{"B", 2}, {"L", 7}, {"m", 5}};
  std::vector<Input> history, candidates;
  for (int i = 0; i < fastrec_inputs(engine.get()); ++i) {
    Input input = made(engine.get(), i, symbols);
    (input.of_candidates ? candidates : history).push_back(std::move(input));
  }
  std::vector<fastrec_array> arrays;
  for (const Input& input : history) arrays.push_back(input.array());
  const auto count = static_cast<int>(arrays.size());
  const int flags = candidates.empty() ? FASTREC_APPENDABLE : 0;
  fastrec_state* encoded = nullptr;
  call(fastrec_encode, engine.get(), arrays.data(), count, flags, &encoded);
  State state(encoded);
  std::printf("a state of %zu bytes\n", fastrec_state_bytes(state.get()));

  if (!candidates.empty()) {
    arrays.clear();
    for (const Input& input : candidates) arrays.push_back(input.array());
    std::vector<float> scores(symbols["B"] * symbols["m"]);
    call(fastrec_score, engine.get(), state.get(), arrays.data(), static_cast<int>(arrays.size()),
         scores.data(), scores.size());
    print(scores.data(), scores.size());
    return;
  }

  // Two more events for each user; lengths are counted on.
  symbols["L"] = 2;
  std::vector<Input> events;
  for (int i = 0; i < fastrec_inputs(engine.get()); ++i)
    if (Input input = made(engine.get(), i, symbols); input.of_events)
      events.push_back(std::move(input));
  arrays.clear();
  for (const Input& input : events) arrays.push_back(input.array());
  fastrec_state* next = nullptr;
  call(fastrec_append, engine.get(), state.get(), arrays.data(), static_cast<int>(arrays.size()),
       &next);
  state.reset(next);
  const float* output = nullptr;
  int64_t sizes[FASTREC_MAX_DIMS];
  int dims = 0;
  call(fastrec_state_output, state.get(), &output, sizes, &dims);
  size_t elements = 1;
  for (int d = 0; d < dims; ++d) elements *= static_cast<size_t>(sizes[d]);
  print(output, elements);
}

}  // namespace

int main(int count, char** arguments) {
  if (count != 2) {
    std::fprintf(stderr, "usage: %s ENGINE\n", arguments[0]);
    return 2;
  }
  try {
    run(arguments[1]);
  } catch (const Error& error) {
    std::fprintf(stderr, "code %d: %s\n", error.code, error.what());
    return 1;
  } catch (const std::exception& error) {
    std::fprintf(stderr, "%s\n", error.what());
    return 1;
  }
  return 0;
}
