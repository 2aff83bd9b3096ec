// Runs a plan. No lock, Python or (once a size has been seen) allocation inside a call; any number
// of callers at once, each with an arena of its own.
#pragma once

#include <atomic>
#include <memory>
#include <vector>

#include "engine/plan.h"

namespace fastrec::engine {

// Bytes behind an output or input that vector kernels may read: a register's width.
inline constexpr int64_t kSlack = 64;

class Executor {
 public:
  explicit Executor(Plan plan);
  ~Executor();

  const Plan& plan() const { return plan_; }

  // Inputs and outputs are contiguous, of the sizes that the symbols say; the caller has checked
  // them. An output that steps read again has the arena's slack behind it (kSlack). Where `step_ns`
  // is not null it receives the time of each step.
  Status run(const Symbols& symbols, const std::byte* const* inputs, std::byte* const* outputs,
             int64_t* step_ns = nullptr);

 private:
  struct Arena;
  struct Lent;
  Arena* take();
  void give(Arena* arena);

  Plan plan_;
  // Arenas that no call uses, as a stack without a lock: a taken one is marked in its own flag.
  static constexpr int kKeptArenas = 64;
  std::atomic<Arena*> kept_[kKeptArenas] = {};
};

}  // namespace fastrec::engine
