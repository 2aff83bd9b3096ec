#include <algorithm>
#include <cstring>

#include "cpu_features.h"
#include "parallel.h"
#include "separable_projection/separable_projection.h"
#include "separable_projection/windows.h"

namespace fastrec::separable_projection {
namespace {

constexpr const Kernel* kKernels[] = {
#if defined(__x86_64__)
    &kAvx512,
    &kAvx2,
#endif
    &kScalar,
};

// Below this many multiply-adds (about 20 us) a second thread costs more than it brings.
constexpr int64_t kParallelMultiplyAdds = 1'000'000;
constexpr int kTileRows = grouped_linear::kTileRows;

int threads_for(int64_t multiply_adds) {
  return multiply_adds < kParallelMultiplyAdds ? 1 : num_threads();
}

// A line of h, 16 channels of `rows` rows, rounded into its half of a line of bf16 pairs.
void store_pairs(const grouped_linear::Kernel& linear, const float* h, int rows, int64_t line,
                 bool last, float* tile) {
  constexpr int64_t kPairLine = 2 * kLine;
  auto* const to = reinterpret_cast<uint16_t*>(tile + line / 2 * rows * kLine) + line % 2 * kLine;
  linear.store(h, kLine, rows, kLine, to, Dtype::bf16, kPairLine, 1);
  if (last && line % 2 == 0)  // no channels beside them
    for (int r = 0; r < rows; ++r) std::fill_n(to + r * kPairLine + kLine, kLine, uint16_t{0});
}

// One group of one block: convolved into tiles, which meet the group's panels at once.
void project_group(const Kernel& kernel, const grouped_linear::Kernel& linear, const Sequences& x,
                   const Shape& shape, const float* taps, const grouped_linear::Panels& panels,
                   const Block& block, int64_t group, const grouped_linear::Matrix& y,
                   Line* memory) {
  const int64_t inputs = shape.channels / panels.groups, lines = lines_of(inputs);
  const int64_t tile_lines = (panels.depth + kLine - 1) / kLine;
  const int64_t window_rows = block.rows + shape.width - 1;
  const bool pairs = linear.unit_inputs == 2;
  float* const window = memory->units;
  float* const tiles = window + lines * window_rows * kLine;
  load_window(grouped_linear::select(Dtype::f32), x, shape, block.batch, block.row0, window_rows,
              group * inputs, inputs, window);
  const int64_t count = (block.rows + kTileRows - 1) / kTileRows;
  const auto row0 = [&](int64_t t) { return grouped_linear::tile_row0(t, block.rows, count); };
  for (int64_t t = 0; t < count; ++t) {
    const int rows = static_cast<int>(row0(t + 1) - row0(t));
    float* const tile = tiles + row0(t) * tile_lines * kLine;
    alignas(64) float h[kTileRows * kLine];
    for (int64_t line = 0; line < lines; ++line) {
      kernel.convolve(window + (line * window_rows + row0(t)) * kLine,
                      taps + (group * lines + line) * shape.width * kLine, shape.width, rows,
                      pairs ? h : tile + line * rows * kLine);
      if (pairs) store_pairs(linear, h, rows, line, line + 1 == lines, tile);
    }
  }
  for (int64_t p = 0; p < panels.count; ++p)
    for (int64_t t = 0; t < count; ++t)
      grouped_linear::multiply_tile(linear, tiles + row0(t) * tile_lines * kLine,
                                    static_cast<int>(row0(t + 1) - row0(t)), panels, group, p, y,
                                    block.batch * shape.length + block.row0 + row0(t));
}

void clear_rows(void* data, Dtype dtype, const Shape& shape, const Block& block, int64_t channels) {
  const int64_t row_bytes = channels * element_bytes(dtype);
  std::memset(static_cast<char*>(data) + (block.batch * shape.length + block.beyond0) * row_bytes,
              0, block.beyond * row_bytes);
}

}  // namespace

const Kernel& select() { return select_kernel(kKernels); }

int64_t forward(const Sequences& x, const void* depthwise, const void* pointwise, const void* bias,
                void* y, const Shape& shape, int64_t groups, int64_t outputs) {
  if (const int64_t bad = bad_length(shape); bad >= 0) return bad;
  if (shape.batch * shape.length == 0) return -1;
  const Kernel& kernel = select();
  const grouped_linear::Kernel& linear = grouped_linear::select(x.dtype);
  const int64_t inputs = shape.channels / groups, lines = lines_of(inputs);
  const int64_t taps_floats = groups * lines * shape.width * kLine;
  const int64_t panel_floats = grouped_linear::panel_floats(linear, groups, outputs, inputs);
  float* const taps = scratch<SharedLine>(lines_of(taps_floats + panel_floats))->units;
  pack_taps(depthwise, x.dtype, false, groups, inputs, shape.width, taps);
  const grouped_linear::Panels panels = grouped_linear::pack(
      linear, pointwise, x.dtype, bias, groups, outputs, inputs, true, taps + taps_floats);
  const grouped_linear::Matrix rows = {y, x.dtype, groups * outputs, {outputs, 1}};

  const int64_t memory_lines = lines * (2 * kBlockRows + shape.width);
  const int threads =
      threads_for(shape.batch * shape.length * shape.channels * (outputs + shape.width));
  parallel_for(shape.batch * blocks_of(shape), 1, threads, [&](int64_t begin, int64_t end) {
    Line* const memory = scratch<Line>(memory_lines);
    for (int64_t index = begin; index < end; ++index) {
      const Block block = block_of(shape, index);
      clear_rows(y, x.dtype, shape, block, groups * outputs);
      for (int64_t g = 0; g < groups && block.rows; ++g)
        project_group(kernel, linear, x, shape, taps, panels, block, g, rows, memory);
    }
  });
  return -1;
}

int64_t convolve(const Sequences& x, const void* depthwise, Dtype depthwise_dtype, bool flipped,
                 void* h, Dtype h_dtype, const Shape& shape) {
  if (const int64_t bad = bad_length(shape); bad >= 0) return bad;
  if (shape.batch * shape.length == 0) return -1;
  const Kernel& kernel = select();
  const grouped_linear::Kernel& rows = grouped_linear::select(Dtype::f32);
  const int64_t lines = lines_of(shape.channels);
  float* const taps = scratch<SharedLine>(lines * shape.width)->units;
  pack_taps(depthwise, depthwise_dtype, flipped, 1, shape.channels, shape.width, taps);
  const int threads = threads_for(shape.batch * shape.length * shape.channels * shape.width);
  parallel_for(shape.batch * blocks_of(shape), 1, threads, [&](int64_t begin, int64_t end) {
    float* const window = scratch<Line>(kBlockRows + shape.width + kTileRows)->units;
    float* const out = window + (kBlockRows + shape.width) * kLine;
    for (int64_t index = begin; index < end; ++index) {
      const Block block = block_of(shape, index);
      clear_rows(h, h_dtype, shape, block, shape.channels);
      for (int64_t line = 0; line < lines && block.rows; ++line) {
        const int64_t channel0 = line * kLine;
        const int count = static_cast<int>(std::min<int64_t>(kLine, shape.channels - channel0));
        load_window(rows, x, shape, block.batch, block.row0, block.rows + shape.width - 1, channel0,
                    count, window);
        for (int64_t r = 0; r < block.rows; r += kTileRows) {
          const int height = static_cast<int>(std::min<int64_t>(kTileRows, block.rows - r));
          kernel.convolve(window + r * kLine, taps + line * shape.width * kLine, shape.width,
                          height, out);
          const int64_t at =
              (block.batch * shape.length + block.row0 + r) * shape.channels + channel0;
          rows.store(out, kLine, height, count, static_cast<char*>(h) + at * element_bytes(h_dtype),
                     h_dtype, shape.channels, 1);
        }
      }
    }
  });
  return -1;
}

}  // namespace fastrec::separable_projection
