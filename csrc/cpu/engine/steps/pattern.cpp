#include "engine/steps/pattern.h"

#include <algorithm>

#include "window_sparse_attention/window_sparse_attention.h"

namespace fastrec::engine {
namespace {

// Sums of positions and distances stay far from what 64 bits hold.
constexpr int64_t kMaxDistance = int64_t{1} << 31;

}  // namespace

void check_pattern(const PatternFields& pattern, const Heads& heads) {
  require(heads.dims.coefficient <= window_sparse_attention::kMaxDims, "heads of at most 256");
  require(pattern.window >= 0 && pattern.window < kMaxDistance, "a window");
  const auto lists = static_cast<int64_t>(pattern.distances.size());
  require(lists == 1 || (lists > 0 && heads.heads == Extent(lists)),
          "one list of distances, or one a head");
  for (const auto& list : pattern.distances) {
    int64_t before = pattern.window;
    for (const int64_t distance : list) {
      require(distance > before && distance < kMaxDistance,
              "distances that rise beyond the window");
      before = distance;
    }
  }
}

int64_t pattern_scores(const PatternFields& pattern, int64_t heads, int64_t queries, int64_t keys) {
  const auto pairs = [&](int64_t shift) {
    return std::max<int64_t>(0, std::min(queries, keys - shift) - std::max<int64_t>(0, -shift));
  };
  const auto of = [&](int64_t distance) {
    return pairs(-distance) + (pattern.causal ? 0 : pairs(distance));
  };
  int64_t window = pairs(0);
  const int64_t most = std::min(pattern.window, std::max(queries, keys) - 1);
  for (int64_t distance = 1; distance <= most; ++distance) window += of(distance);
  int64_t scores = 0;
  for (const auto& list : pattern.distances) {
    int64_t head = window;
    for (const int64_t distance : list) head += of(distance);
    scores += head * (pattern.distances.size() == 1 ? heads : 1);
  }
  return scores;
}

}  // namespace fastrec::engine
