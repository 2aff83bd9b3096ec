#include <algorithm>
#include <atomic>

#include "cpu_features.h"
#include "parallel.h"
#include "scratch.h"
#include "sparse_int8_linear/sparse_int8_linear.h"

namespace fastrec::sparse_int8_linear {
namespace {

// Newest first: the first one at or below the active ISA runs.
constexpr const Kernel* kKernels[] = {
#if defined(__x86_64__)
    &kAvx512vnni,
#endif
    &kScalar,
};

// Below this many multiply-adds a second thread costs more than it brings (about 2 us of work).
constexpr int64_t kParallelMultiplyAdds = 400'000;
constexpr int64_t kParallelPackBytes = 32 * 1024;
// Chunks small enough that the last one hardly matters, large enough to amortise claiming one.
constexpr int64_t kChunksPerThread = 16;

// Rows are cut into the fewest tiles, all of nearly the same height.
struct Tiling {
  int64_t rows, count;
  int64_t row0(int64_t tile) const { return tile * rows / count; }
  int height(int64_t tile) const { return static_cast<int>(row0(tile + 1) - row0(tile)); }
};

}  // namespace

const Kernel& select() { return select_kernel(kKernels); }

bool run(const Call& call) {
  if (call.rows == 0 || call.weight.outputs == 0) return true;
  const Kernel& kernel = select();
  const Tiling tiling{call.rows, (call.rows + kMaxTileRows - 1) / kMaxTileRows};
  const int64_t chunks = (call.weight.inputs + kTileChunk - 1) / kTileChunk;
  const int64_t row_bytes = chunks * kTileChunk;
  uint8_t* tiles = scratch<uint8_t>(call.rows * row_bytes);

  std::atomic<bool> numbers{true};
  const bool pack_alone = call.rows * row_bytes < kParallelPackBytes;
  parallel_for(tiling.count, 1, pack_alone ? 1 : num_threads(), [&](int64_t begin, int64_t end) {
    for (int64_t t = begin; t < end; ++t)
      if (!kernel.pack_tile(call, tiling.row0(t), tiling.height(t),
                            tiles + tiling.row0(t) * row_bytes))
        numbers.store(false, std::memory_order_relaxed);
  });
  if (!numbers.load(std::memory_order_relaxed)) return false;

  const int64_t panels = (call.weight.outputs + kPanelOutputs - 1) / kPanelOutputs;
  const int64_t groups = call.weight.panel_start[panels];
  const bool alone = call.rows * groups * kGroupBytes < kParallelMultiplyAdds;
  const int threads = alone ? 1 : num_threads();
  // Panel-major: a chunk is a contiguous run of blocks, whose weights are read once from memory and
  // then from the core's caches, and which shares no output cache line but at its border.
  const int64_t blocks = panels * tiling.count;
  const int64_t grain = std::max<int64_t>(1, blocks / (threads * kChunksPerThread));
  parallel_for(blocks, grain, threads, [&](int64_t begin, int64_t end) {
    for (int64_t b = begin; b < end; ++b) {
      const int64_t t = b % tiling.count;
      kernel.block(call, {tiles + tiling.row0(t) * row_bytes, tiling.row0(t), tiling.height(t),
                          b / tiling.count, t, tiling.count});
    }
  });
  return true;
}

const char* check_packed(const int32_t* group_index, int64_t groups, const int32_t* panel_start,
                         int64_t panels, int64_t inputs) {
  if (panel_start[0] != 0) return "panel_start must begin with 0";
  for (int64_t p = 0; p < panels; ++p)
    if (panel_start[p + 1] < panel_start[p]) return "panel_start must never fall";
  if (panel_start[panels] != groups) return "panel_start must end with the number of groups";
  const int32_t limit = static_cast<int32_t>((inputs + kGroupInputs - 1) / kGroupInputs);
  for (int64_t g = 0; g < groups; ++g)
    if (group_index[g] < 0 || group_index[g] >= limit)
      return "group_index must lie in [0, ceil(K / 4))";
  return nullptr;
}

}  // namespace fastrec::sparse_int8_linear
