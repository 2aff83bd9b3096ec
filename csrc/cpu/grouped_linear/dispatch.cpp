#include <algorithm>

#include "cpu_features.h"
#include "grouped_linear/bf16.h"
#include "grouped_linear/grouped_linear.h"
#include "parallel.h"
#include "scratch.h"

namespace fastrec::grouped_linear {
namespace {

// Newest first: the first one at or below the active ISA runs.
constexpr const Kernel* kF32Kernels[] = {
#if defined(__x86_64__)
    &kAvx512,
    &kAvx2,
#endif
    &kScalar,
};
constexpr const Kernel* kBf16Kernels[] = {
#if defined(__x86_64__)
    &kAvx512bf16,
    &kAvx512,
    &kAvx2,
#endif
    &kScalar,
};

// Below this many multiply-adds (about 20 us) a second thread costs more than it brings.
constexpr int64_t kParallelMultiplyAdds = 1'000'000;
// Tiles of one group that are multiplied with a panel while it is in L1, and their inputs in L2.
constexpr int64_t kBlockTiles = 8;
constexpr int64_t kBlockFloats = 64 * 1024;
constexpr int64_t kCacheLine = 64;

struct alignas(64) Line {
  float units[kLine];
};

// No hardware prefetcher follows a group's part of row after row.
void prefetch(const char* rows, int64_t stride_bytes, int count, int64_t bytes) {
  for (int r = 0; r < count; ++r, rows += stride_bytes)
    for (int64_t i = 0; i < bytes; i += kCacheLine) __builtin_prefetch(rows + i, 0, 2);
}

// c = a times the panels of each group.
void project(const Kernel& kernel, const Matrix& a, int64_t inputs, const Panels& panels,
             const Matrix& c, int64_t rows) {
  const int64_t tiles = (rows + kTileRows - 1) / kTileRows;
  const int64_t lines = (panels.depth + kLine - 1) / kLine;
  const int64_t tile_lines = lines * kTileRows;
  const int64_t block = std::clamp<int64_t>(kBlockFloats / (tile_lines * kLine), 1, kBlockTiles);
  const int64_t macs = rows * panels.groups * panels.columns * inputs;
  const int threads = macs < kParallelMultiplyAdds ? 1 : num_threads();
  const int64_t element_bytes = a.dtype == Dtype::f32 ? 4 : 2;
  parallel_for(tiles, block, threads, [&](int64_t begin, int64_t end) {
    Line* const memory = scratch<Line>(block * tile_lines);
    const char* const rows_of = static_cast<const char*>(a.data);
    const int64_t last_row = tile_row0(end, rows, tiles);
    for (int64_t first = begin; first < end; first += block) {
      const int64_t last = std::min(first + block, end);
      const int64_t block_rows = tile_row0(last, rows, tiles) - tile_row0(first, rows, tiles);
      for (int64_t g = 0; g < panels.groups; ++g) {
        const char* from = rows_of + g * a.channels.group * element_bytes;
        for (int64_t t = first; t < last; ++t) {
          const int64_t row0 = tile_row0(t, rows, tiles);
          const int height = static_cast<int>(tile_row0(t + 1, rows, tiles) - row0);
          kernel.load(from + row0 * a.row_stride * element_bytes, a.dtype, a.row_stride,
                      a.channels.element, inputs, height, memory[(t - first) * tile_lines].units,
                      kLine, height * kLine);
        }
        for (int64_t p = 0; p < panels.count; ++p)
          for (int64_t t = first; t < last; ++t) {
            const int64_t row0 = tile_row0(t, rows, tiles);
            const int height = static_cast<int>(tile_row0(t + 1, rows, tiles) - row0);
            multiply_tile(kernel, memory[(t - first) * tile_lines].units, height, panels, g, p, c,
                          row0);
            if (p > 0) continue;
            // Prefetch for the next round of this loop: the next group of these rows, or the rows
            // of the next block.
            const bool more = g + 1 < panels.groups;
            const int64_t next = more ? row0 : row0 + block_rows;
            if (next + height <= last_row)
              prefetch(rows_of + ((more ? g + 1 : 0) * a.channels.group + next * a.row_stride) *
                                     element_bytes,
                       a.row_stride * element_bytes, height, inputs * element_bytes);
          }
      }
    }
  });
}

constexpr int64_t kDotBlocks = 4;  // of 16 outputs, that a thread claims at a time

// At most Kernel::few_rows rows.

void forward_few(const Kernel& kernel, const Matrix& x, const void* weight, const void* bias,
                 const Matrix& y, const Sizes& sizes) {
  const int64_t bytes = x.dtype == Dtype::f32 ? 4 : 2;
  const int64_t blocks = (sizes.outputs + kLine - 1) / kLine;
  const int rows = static_cast<int>(sizes.rows);
  const int64_t macs = sizes.rows * sizes.groups * sizes.outputs * sizes.inputs;
  const int threads = macs < kParallelMultiplyAdds ? 1 : num_threads();
  const bool in_place = y.dtype == Dtype::f32 && y.channels.element == 1;
  parallel_for(sizes.groups * blocks, kDotBlocks, threads, [&](int64_t begin, int64_t end) {
    for (int64_t b = begin; b < end; ++b) {
      const int64_t g = b / blocks, o = b % blocks * kLine, at = g * sizes.outputs + o;
      const int count = static_cast<int>(std::min<int64_t>(kLine, sizes.outputs - o));
      float offsets[kLine] = {};
      const float* start = offsets;
      if (bias && x.dtype == Dtype::f32)
        start = static_cast<const float*>(bias) + at;
      else if (bias)
        std::transform(static_cast<const uint16_t*>(bias) + at,
                       static_cast<const uint16_t*>(bias) + at + count, offsets, from_bf16);
      const char* const from = static_cast<const char*>(x.data) + g * x.channels.group * bytes;
      const char* const matrix = static_cast<const char*>(weight) + at * sizes.inputs * bytes;
      char* const to = static_cast<char*>(const_cast<void*>(y.data)) +
                       (g * y.channels.group + o * y.channels.element) * bytes;
      alignas(64) float sums[kTileRows * kLine];
      float* const c = in_place ? reinterpret_cast<float*>(to) : sums;
      kernel.dots(from, x.row_stride, matrix, x.dtype, sizes.inputs, count, rows, start, c,
                  in_place ? y.row_stride : kLine);
      if (!in_place)
        kernel.store(sums, kLine, rows, count, to, y.dtype, y.row_stride, y.channels.element);
    }
  });
}

}  // namespace

const Kernel& select(Dtype dtype) {
  return dtype == Dtype::f32 ? select_kernel(kF32Kernels) : select_kernel(kBf16Kernels);
}

void multiply_tile(const Kernel& kernel, const float* tile, int rows, const Panels& panels,
                   int64_t group, int64_t panel, const Matrix& c, int64_t row0) {
  const int64_t column0 = panel * kPanelColumns;
  const int count = static_cast<int>(std::min<int64_t>(kPanelColumns, panels.columns - column0));
  const int halves = count > kLine ? 2 : 1;
  const float* values = panels.of(group, panel);
  const float* start = panels.start + (group * panels.count + panel) * kPanelColumns;
  const int64_t at = row0 * c.row_stride + group * c.channels.group + column0 * c.channels.element;
  if (c.dtype == Dtype::f32 && c.channels.element == 1 && count == halves * kLine) {
    float* const to = static_cast<float*>(const_cast<void*>(c.data)) + at;
    // Lines that the product will write: on their way while it is computed.
    for (int r = 0; r < rows; ++r)
      for (int n = 0; n < count; n += kLine) __builtin_prefetch(to + r * c.row_stride + n, 1, 3);
    kernel.multiply(tile, values, panels.depth, rows, halves, start, to, c.row_stride);
    return;
  }
  alignas(64) float sums[kTileRows * kPanelColumns];
  kernel.multiply(tile, values, panels.depth, rows, halves, start, sums, kPanelColumns);
  char* const to =
      static_cast<char*>(const_cast<void*>(c.data)) + at * (c.dtype == Dtype::f32 ? 4 : 2);
  kernel.store(sums, kPanelColumns, rows, count, to, c.dtype, c.row_stride, c.channels.element);
}

void forward(const Matrix& x, const void* weight, const void* bias, const Matrix& y,
             const Sizes& sizes) {
  if (sizes.rows == 0) return;
  const Kernel& kernel = select(x.dtype);
  if (sizes.rows <= kernel.few_rows) {
    forward_few(kernel, x, weight, bias, y, sizes);
    return;
  }
  float* const memory =
      scratch<float>(panel_floats(kernel, sizes.groups, sizes.outputs, sizes.inputs));
  const Panels panels =
      pack(kernel, weight, x.dtype, bias, sizes.groups, sizes.outputs, sizes.inputs, true, memory);
  project(kernel, x, sizes.inputs, panels, y, sizes.rows);
}

void input_gradient(const Matrix& dy, const void* weight, const Matrix& dx, const Sizes& sizes) {
  if (sizes.rows == 0) return;
  const Kernel& kernel = select(dy.dtype);
  float* const memory =
      scratch<float>(panel_floats(kernel, sizes.groups, sizes.inputs, sizes.outputs));
  const Panels panels = pack(kernel, weight, dy.dtype, nullptr, sizes.groups, sizes.inputs,
                             sizes.outputs, false, memory);
  project(kernel, dy, sizes.outputs, panels, dx, sizes.rows);
}

}  // namespace fastrec::grouped_linear
