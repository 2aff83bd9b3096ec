// Patterns, and rows in two memory layouts, for the tests of the attention ops.
#pragma once

#include <cmath>
#include <cstdint>
#include <string>
#include <vector>

#include "attention_pattern.h"

namespace fastrec::tests {

struct Sizes {
  int64_t batch, heads, rows, dims;
  int64_t rows_of_all() const { return batch * heads * rows; }
  size_t elements() const { return static_cast<size_t>(rows_of_all() * dims); }
};

// [B, H, L, D] or, together, [B, L, H, D]: a head's rows then lie among those of the others.
struct Strides {
  int64_t batch, head, row;
  Strides(const Sizes& s, bool together)
      : batch(s.heads * s.rows * s.dims),
        head(together ? s.dims : s.rows * s.dims),
        row(together ? s.heads * s.dims : s.dims) {}
};

// Values behind a length are never read as numbers.
template <class T>
void spoil_beyond(const std::vector<int64_t>& lengths, const Sizes& sizes, bool together, T with,
                  std::vector<T>* values) {
  const Strides at(sizes, together);
  for (size_t b = 0; b < lengths.size(); ++b)
    for (int64_t h = 0; h < sizes.heads; ++h)
      for (int64_t i = lengths[b]; i < sizes.rows; ++i)
        for (int64_t d = 0; d < sizes.dims; ++d)
          (*values)[static_cast<int64_t>(b) * at.batch + h * at.head + i * at.row + d] = with;
}

// A window, and each head's distances beyond it.
struct Seen {
  int64_t window;
  bool causal;
  std::vector<std::vector<int64_t>> distances;  // one list a head

  std::vector<int64_t> flat() const {
    std::vector<int64_t> all;
    for (const auto& list : distances) all.insert(all.end(), list.begin(), list.end());
    return all;
  }
  std::vector<int64_t> starts() const {
    std::vector<int64_t> all{0};
    for (const auto& list : distances)
      all.push_back(all.back() + static_cast<int64_t>(list.size()));
    return all;
  }
  std::string text() const {
    return "window " + std::to_string(window) + (causal ? " causal" : "") + " far " +
           std::to_string(starts().back());
  }
};

inline std::string text_of(const Sizes& s) {
  return "B" + std::to_string(s.batch) + " H" + std::to_string(s.heads) + " L" +
         std::to_string(s.rows) + " D" + std::to_string(s.dims);
}

// Two heads: no window alone, windows of all kinds, near and far distances, some out of reach.
inline std::vector<Seen> patterns_of_two_heads(bool causal) {
  return {{0, causal, {{}, {1}}},
          {3, causal, {{4, 9, 33}, {15, 16, 17, 31, 200}}},
          {16, causal, {{}, {}}},
          {1000, causal, {{1001}, {}}}};
}

}  // namespace fastrec::tests
