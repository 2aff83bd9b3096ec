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
    &kAvx512vnni, &kAvx512, &kAvxvnni, &kAvx2,
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
  Tiling(int64_t rows, int max_rows) : rows(rows), count((rows + max_rows - 1) / max_rows) {}
  int64_t row0(int64_t tile) const { return tile * rows / count; }
  int height(int64_t tile) const { return static_cast<int>(row0(tile + 1) - row0(tile)); }

  int64_t rows, count;
};

int64_t round_up(int64_t value, int64_t unit) { return (value + unit - 1) / unit * unit; }

// One allocation for all that a call needs beside its operands.
struct Workspace {
  Workspace(int64_t padded_outputs, int64_t tile_bytes)
      : start(scratch<int32_t>(3 * padded_outputs + (tile_bytes + 3) / 4)),
        scale(reinterpret_cast<float*>(start + padded_outputs)),
        bias(scale + padded_outputs),
        tiles(reinterpret_cast<uint8_t*>(bias + padded_outputs)) {}

  Folded fold(const Call& call, int64_t padded_outputs) {
    const Weight& weight = call.weight;
    const int64_t outputs = weight.outputs;
    for (int64_t n = 0; n < outputs; ++n) {
      // Unsigned, because the product may wrap where the final sum does not.
      start[n] = static_cast<int32_t>(0u - static_cast<uint32_t>(call.x_quantisation.zero_point) *
                                               static_cast<uint32_t>(weight.sum[n]));
      scale[n] = call.x_quantisation.scale * weight.scale[n];
    }
    if (weight.bias)
      std::copy(weight.bias, weight.bias + outputs, bias);
    else
      std::fill(bias, bias + outputs, -0.0f);
    std::fill(start + outputs, start + padded_outputs, 0);
    std::fill(scale + outputs, scale + padded_outputs, 0.0f);
    std::fill(bias + outputs, bias + padded_outputs, 0.0f);
    return {start, scale, bias};
  }

  int32_t* start;
  float *scale, *bias;
  uint8_t* tiles;
};

}  // namespace

const Kernel& select() { return select_kernel(kKernels); }

bool run(const Call& call) {
  if (call.rows == 0 || call.weight.outputs == 0) return true;
  const Kernel& kernel = select();
  const Tiling tiling(call.rows, kernel.max_rows);
  const int64_t panels = (call.weight.outputs + kPanelOutputs - 1) / kPanelOutputs;
  const int64_t row_bytes = round_up(call.weight.inputs, kTileChunk) * kernel.element_bytes;
  Workspace work(panels * kPanelOutputs, call.rows * row_bytes);
  const Folded folded = work.fold(call, panels * kPanelOutputs);
  uint8_t* const tiles = work.tiles;

  std::atomic<bool> numbers{true};
  const bool pack_alone = call.rows * row_bytes < kParallelPackBytes;
  parallel_for(tiling.count, 1, pack_alone ? 1 : num_threads(), [&](int64_t begin, int64_t end) {
    for (int64_t t = begin; t < end; ++t)
      if (!kernel.pack_tile(call, tiling.row0(t), tiling.height(t),
                            tiles + tiling.row0(t) * row_bytes))
        numbers.store(false, std::memory_order_relaxed);
  });
  if (!numbers.load(std::memory_order_relaxed)) return false;

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
      kernel.block(call, folded,
                   {tiles + tiling.row0(t) * row_bytes, tiling.row0(t), tiling.height(t),
                    b / tiling.count, t, tiling.count});
    }
  });
  return true;
}

}  // namespace fastrec::sparse_int8_linear
