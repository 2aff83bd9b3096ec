// Which keys a query sees: AttentionPattern of the Python side, as kernels take it.
#pragma once

#include <algorithm>
#include <cstdint>

namespace fastrec {

// Query i sees key j where 0 <= j < keys, (not causal or j <= i), and |i - j| <= window or
// |i - j| is one of its head's distances, which rise, are distinct and lie beyond the window.
struct AttentionPattern {
  int64_t window;
  bool causal;
  const int64_t* distances;  // of all heads, one head after the other
  const int64_t* starts;     // [heads + 1] into distances

  int64_t far_count(int64_t head) const {
    return (starts[head + 1] - starts[head]) * (causal ? 1 : 2);
  }
  // The n-th far key of query i is i + far_shift(head, n); before the query first, then behind it.
  int64_t far_shift(int64_t head, int64_t n) const {
    const int64_t distances_of_head = starts[head + 1] - starts[head];
    return n < distances_of_head ? -distances[starts[head] + n]
                                 : distances[starts[head] + n - distances_of_head];
  }
  // Window keys of queries [first, last]: [begin, end), cut at `keys`; empty where end <= begin.
  int64_t window_begin(int64_t first) const { return std::max<int64_t>(0, first - window); }
  int64_t window_end(int64_t last, int64_t keys) const {
    return std::min(keys, last + (causal ? 0 : window) + 1);
  }
};

}  // namespace fastrec
