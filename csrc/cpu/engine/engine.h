// An engine: a checked program with its inputs, ready to be called from any number of threads.
#pragma once

#include <map>
#include <memory>
#include <mutex>
#include <stdexcept>
#include <string>
#include <vector>

#include "engine/executor.h"
#include "engine/input_spec.h"
#include "engine/json.h"

namespace fastrec::engine {

class SplitExecutors;

// Why a call was refused, by the kinds of error that callers tell apart.
class Refused : public std::runtime_error {
 public:
  enum class Kind { argument, shape, id_range, unsupported };

  Refused(Kind kind, std::string name, std::string expected, std::string came)
      : std::runtime_error(name + ": expected " + expected + ", got " + came),
        kind(kind),
        name(std::move(name)),
        expected(std::move(expected)),
        came(std::move(came)) {}
  // Of the engine as it is, whatever the arguments.
  explicit Refused(const std::string& why)
      : std::runtime_error(why), kind(Kind::unsupported), expected(why) {}

  const Kind kind;
  const std::string name, expected, came;
};

// The calling thread's setting of threads for the time of a call, which may throw.
struct CallThreads {
  explicit CallThreads(int threads);
  CallThreads(const CallThreads&) = delete;
  ~CallThreads();

  const int before;
};

// The sizes that a program's steps see.
Symbols symbols_of(const SpecSizes& sizes);

// The error of a step that met a bad value, in terms of the inputs that it came from. `inputs` are
// the program's, by name; of several that may have brought it, the one that holds it is named.
Refused refusal_of(const Program& program, const std::vector<std::string>& names,
                   const Array* inputs, const Symbols& symbols, const Status& status);

class Engine {
 public:
  // `header`: {"program", "spec", "threads", ...} as engine files hold it (file.h). The constants
  // lie in `memory`. Throws json::Error or InvalidProgram.
  Engine(const json::Value& header, std::vector<Constant> constants, std::shared_ptr<void> memory);
  ~Engine();

  const InputSpec& inputs() const { return inputs_; }
  const Program& program() const { return program_; }
  Executor& executor() { return *executor_; }
  // Threads that the engine was made for.
  int threads() const { return threads_; }

  // The program in the order that it runs, and how: "users" (a symbol or null), "rows_of_layers"
  // (of one user), "groups" ([first step, step behind the last, symbol]) and "slots" (buffers that
  // take turns in the same memory).
  json::Value plan() const;

  // Whether there is one output, float32, as every engine file has it.
  bool gives_scores() const;
  std::vector<int64_t> output_sizes(const SpecSizes& sizes, size_t output = 0) const;
  // The outputs of inputs that the specification admits, on at most `threads` threads. `step_ns`
  // receives each step's time where it is not null. Throws Refused or std::bad_alloc.
  void run(const Array* inputs, const SpecSizes& sizes, std::byte* const* outputs, int threads,
           int64_t* step_ns = nullptr);
  // The same of an engine that gives scores.
  void run(const Array* inputs, const SpecSizes& sizes, float* scores, int threads);

  // The parts for these candidate inputs (positions), made once. Throws CannotSplit.
  std::shared_ptr<SplitExecutors> split(const std::vector<int>& candidates, bool appendable);

 private:
  std::shared_ptr<void> memory_;
  Program program_;
  InputSpec inputs_;
  int threads_;
  std::unique_ptr<Executor> executor_;
  std::mutex mutex_;
  std::map<std::pair<std::vector<int>, bool>, std::shared_ptr<SplitExecutors>> splits_;
};

}  // namespace fastrec::engine
