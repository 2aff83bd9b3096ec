// A user's history encoded once, scored against candidates as often as need be, and taken further
// when new events come.
#pragma once

#include <memory>
#include <optional>
#include <string>
#include <vector>

#include "engine/engine.h"
#include "engine/split.h"

namespace fastrec::engine {

// An array that owns its memory, which begins on a cache line.
class Values {
 public:
  Values(Dtype dtype, std::vector<int64_t> sizes);
  // A copy.
  explicit Values(const Array& from);

  Array array() const { return {data(), dtype, static_cast<int>(sizes.size()), sizes.data()}; }
  std::byte* data() const { return memory_.get(); }
  int64_t bytes() const;

  const Dtype dtype;
  const std::vector<int64_t> sizes;

 private:
  struct Free {
    void operator()(std::byte* memory) const;
  };
  std::unique_ptr<std::byte[], Free> memory_;
};
using SharedValues = std::shared_ptr<const Values>;

// The encoded histories of B users; immutable, for any number of threads.
struct UserState {
  // The computed part, then the history's inputs that the second part reads as they are.
  std::vector<SharedValues> values;
  SpecSizes sizes;
  // Of a state that events can be appended to: the rows of the past that attention reads, the
  // history's inputs that are not events, and how many events each user has.
  std::vector<SharedValues> caches, others;
  std::vector<int64_t> lengths;

  int64_t bytes() const;
};

// The executors of a program's two parts, which share the engine's packed weights. The engine
// outlives them.
class SplitExecutors {
 public:
  // Throws CannotSplit, or Refused where an input of one part bounds the other's ids.
  SplitExecutors(Engine& engine, const std::vector<int>& candidates, bool appendable);
  ~SplitExecutors();

  // Positions of the whole program's inputs that `encode`, `append` and `score` take, in order.
  const std::vector<int>& history() const { return parts_.history; }
  const std::vector<int>& candidates() const { return parts_.candidates; }
  const std::vector<int>& events() const;
  // As JSON; `score` where there is one.
  std::vector<std::string> programs() const;
  bool scores() const { return score_ != nullptr; }
  bool appends() const { return appends_ != nullptr; }
  const InputSpec& history_inputs() const { return history_inputs_; }
  const InputSpec& candidate_inputs() const { return candidate_inputs_; }
  const InputSpec& event_inputs() const;

  // Each takes inputs that its specification admits (`sizes` as `admits` leaves them; of `score`
  // begun with the state's), and throws Refused or std::bad_alloc.
  std::shared_ptr<const UserState> encode(const Array* history, const SpecSizes& sizes,
                                          int threads) const;
  std::shared_ptr<const UserState> append(const UserState& state, const Array* events,
                                          int threads) const;
  std::vector<int64_t> output_sizes(const SpecSizes& sizes) const;
  void score(const UserState& state, const Array* candidates, const SpecSizes& sizes, float* scores,
             int threads) const;

 private:
  struct Appends;

  Split parts_;
  InputSpec history_inputs_, candidate_inputs_;
  size_t computed_;        // outputs of `encode` that are the state; the others are caches alone
  std::vector<int> kept_;  // positions among the history's inputs
  std::unique_ptr<Executor> encode_, score_;
  std::unique_ptr<Appends> appends_;
};

}  // namespace fastrec::engine
