// The depthwise taps' gradient: lines of 16 channels times slices of the blocks of rows; a slice of
// a line is summed by one thread, the slices are added in order.
#include <algorithm>

#include "grouped_linear/bf16.h"
#include "parallel.h"
#include "separable_projection/separable_projection.h"
#include "separable_projection/windows.h"

namespace fastrec::separable_projection {
namespace {

constexpr int64_t kParts = 32;
constexpr int64_t kSliceBlocks = 8;
constexpr int64_t kParallelMultiplyAdds = 500'000;

}  // namespace

int64_t depthwise_gradient(const float* dh, const Sequences& x, void* ddepthwise, Dtype to,
                           const Shape& shape) {
  if (const int64_t bad = bad_length(shape); bad >= 0) return bad;
  const Kernel& kernel = select();
  const grouped_linear::Kernel& rows = grouped_linear::select(Dtype::f32);
  const int64_t lines = lines_of(shape.channels), blocks = shape.batch * blocks_of(shape);
  const int64_t slices = std::max<int64_t>(1, std::min(kParts / lines, blocks / kSliceBlocks));
  const int64_t part_floats = shape.width * kLine;
  float* const sums = scratch<SharedLine>(lines * slices * shape.width)->units;
  // dh is read as it is; no tap looks beyond its rows.
  Shape own = shape;
  own.before = 0;
  const Sequences gradient = {dh, Dtype::f32, shape.length * shape.channels, shape.channels};
  const int64_t macs = shape.batch * shape.length * shape.channels * shape.width;
  const int threads = macs < kParallelMultiplyAdds ? 1 : num_threads();
  parallel_for(lines * slices, 1, threads, [&](int64_t begin, int64_t end) {
    float* const window = scratch<Line>(2 * kBlockRows + shape.width)->units;
    float* const copy = window + (kBlockRows + shape.width) * kLine;
    for (int64_t p = begin; p < end; ++p) {
      const int64_t line = p % lines, slice = p / lines, channel0 = line * kLine;
      const int64_t count = std::min<int64_t>(kLine, shape.channels - channel0);
      float* const taps = sums + p * part_floats;
      std::fill_n(taps, part_floats, 0.0f);
      for (int64_t index = slice * blocks / slices; index < (slice + 1) * blocks / slices;
           ++index) {
        const Block block = block_of(shape, index);
        if (block.rows == 0) continue;
        load_window(rows, x, shape, block.batch, block.row0, block.rows + shape.width - 1, channel0,
                    count, window);
        load_window(rows, gradient, own, block.batch, block.row0, block.rows, channel0, count,
                    copy);
        kernel.correlate(copy, window, shape.width, block.rows, taps);
      }
    }
  });
  for (int64_t c = 0; c < shape.channels; ++c)
    for (int j = 0; j < shape.width; ++j) {
      float sum = 0.0f;
      for (int64_t s = 0; s < slices; ++s)
        sum += sums[((s * lines + c / kLine) * shape.width + j) * kLine + c % kLine];
      if (to == Dtype::f32)
        static_cast<float*>(ddepthwise)[c * shape.width + j] = sum;
      else
        static_cast<uint16_t*>(ddepthwise)[c * shape.width + j] = to_bf16(sum);
    }
  return -1;
}

}  // namespace fastrec::separable_projection
