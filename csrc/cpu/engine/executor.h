// Runs a plan. No lock, Python or (once a size has been seen) allocation inside a call; any number
// of callers at once, each with an arena of its own.
//
// A batch of independent users is run a few users at a time, one part on each thread: a part's
// activations stay in that core's caches, and threads meet once a call, not once a step. What does
// not divide among the threads is run by all of them together, which take the rows of a group of
// steps apart.
#pragma once

#include <atomic>
#include <memory>
#include <vector>

#include "engine/plan.h"

namespace fastrec::engine {

// Bytes between the buffers of an arena. No step reads or writes outside its operands (the tests
// hold each to that with guard pages), so inputs and outputs need no such room.
inline constexpr int64_t kSlack = 64;

// The sizes of an array of the caller's. Throws std::bad_alloc beyond what any machine holds.
std::vector<int64_t> sizes_at(const Shape& shape, const Symbols& symbols);

class Executor {
 public:
  explicit Executor(Plan plan);
  ~Executor();

  const Plan& plan() const { return plan_; }

  // Inputs and outputs are contiguous, of the sizes that the symbols say; the caller has checked
  // them. Steps may read outputs again. Where `step_ns` is not null it receives the time of each
  // step (over the number of parts at work at once).
  Status run(const Symbols& symbols, const std::byte* const* inputs, std::byte* const* outputs,
             int64_t* step_ns = nullptr);

 private:
  struct Arena;
  struct Lent;
  struct Request;
  struct Place;
  struct Rows;
  Arena* take();
  void give(Arena* arena);
  int64_t users_a_part(const Symbols& symbols) const;
  Status run_part(const Request& request, int64_t user0, int64_t users, int64_t beside);
  Status run_rows(const Place& place, size_t group, int threads);
  Status run_step(const Place& place, size_t position, const Rows* rows);

  Plan plan_;
  // Arenas that no call uses, as a stack without a lock: a taken one is marked in its own flag.
  static constexpr int kKeptArenas = 64;
  std::atomic<Arena*> kept_[kKeptArenas] = {};
  // The time a user took on one thread when users were last run apart, and a row of each group, in
  // ns and ps; 0: not known yet. They only say whether sleeping workers are worth waking.
  std::atomic<int64_t> user_ns_{0};
  std::unique_ptr<std::atomic<int64_t>[]> row_ps_;
};

}  // namespace fastrec::engine
