// Who sees whom in window_sparse_attention and its relatives.
#pragma once

#include "engine/check.h"
#include "engine/make_kind.h"
#include "engine/steps/heads.h"

namespace fastrec::engine {

// The window where every query sees every key: so it is also for a part of the queries, whose
// positions then count from 0 again.
inline constexpr int64_t kEverything = int64_t{1} << 30;

struct PatternFields {
  bool causal = false;  // query i sees no key beyond i
  int64_t window = 0;   // keys at most so far away are seen
  Lists distances;      // and those at these; one list, or one a head, rising beyond the window

  template <class V>
  void each(V& visit) {
    visit("causal", causal);
    visit("window", window);
    visit("distances", distances);
  }
};

void check_pattern(const PatternFields& pattern, const Heads& heads);
// The scores of all heads, cut at the sequence's ends.
int64_t pattern_scores(const PatternFields& pattern, int64_t heads, int64_t queries, int64_t keys);

}  // namespace fastrec::engine
