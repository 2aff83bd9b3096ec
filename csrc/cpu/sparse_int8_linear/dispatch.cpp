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

}  // namespace

const Kernel& select() { return select_kernel(kKernels); }

Folding::Folding(const Weight& weight, Quantisation x) {
  const int64_t padded = tile_row_elements(weight.outputs);
  start_.resize(padded);
  scale_.resize(padded);
  bias_.resize(padded, -0.0f);
  for (int64_t n = 0; n < weight.outputs; ++n) {
    // Unsigned, because the product may wrap where the final sum does not.
    start_[n] = static_cast<int32_t>(0u - static_cast<uint32_t>(x.zero_point) *
                                              static_cast<uint32_t>(weight.sum[n]));
    scale_[n] = x.scale * weight.scale[n];
  }
  if (weight.bias) std::copy(weight.bias, weight.bias + weight.outputs, bias_.begin());
}

bool run(const Call& call) {
  if (call.rows == 0 || call.weight.outputs == 0) return true;
  const Kernel& kernel = select();
  const Tiling tiling(call.rows, kernel.max_rows);
  const int64_t panels = (call.weight.outputs + kPanelOutputs - 1) / kPanelOutputs;
  const int64_t row_bytes = tile_row_elements(call.weight.inputs) * kernel.element_bytes;

  const uint8_t* tiles = static_cast<const uint8_t*>(call.x);
  if (call.x_dtype != Dtype::u8_tiles) {
    uint8_t* const packed = scratch<uint8_t>(call.rows * row_bytes);
    std::atomic<bool> numbers{true};
    const bool pack_alone = call.rows * row_bytes < kParallelPackBytes;
    parallel_for(tiling.count, 1, pack_alone ? 1 : num_threads(), [&](int64_t begin, int64_t end) {
      for (int64_t t = begin; t < end; ++t)
        if (!kernel.pack_tile(call, tiling.row0(t), tiling.height(t),
                              packed + tiling.row0(t) * row_bytes))
          numbers.store(false, std::memory_order_relaxed);
    });
    if (!numbers.load(std::memory_order_relaxed)) return false;
    tiles = packed;
  }

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

}  // namespace fastrec::sparse_int8_linear
