// The fields of resumed_attention, which causal kinds of attention make of theirs.
#pragma once

#include "engine/make_kind.h"

namespace fastrec::engine {

struct ResumedAttentionFields {
  double scale = 1;
  bool has_pattern = false;  // else every key up to the query's is seen
  int64_t window = 0;
  Lists distances;  // as in window_sparse_attention

  template <class V>
  void each(V& visit) {
    visit("scale", scale);
    visit("has_pattern", has_pattern);
    visit("window", window);
    visit("distances", distances);
  }
};

}  // namespace fastrec::engine
