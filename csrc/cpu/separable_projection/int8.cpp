// Depthwise convolution of u8 by s8 taps to u8: the f32 kernels, which are exact on such integers.
#include <algorithm>
#include <cstring>

#include "parallel.h"
#include "separable_projection/separable_projection.h"
#include "separable_projection/windows.h"

namespace fastrec::separable_projection {
namespace {

constexpr int64_t kParallelMultiplyAdds = 500'000;
constexpr int kTileRows = grouped_linear::kTileRows;

// Adding and taking away 1.5 * 2^23 rounds to an integer, half to even, for |x| < 2^22.
float round_half_even(float x) { return (x + 12582912.0f) - 12582912.0f; }

// Rows of up to 16 channels less the zero point; zeros where there are none.
void load_window(const Quantised& call, const Shape& shape, int64_t batch, int64_t row0,
                 int64_t rows, int64_t channel0, int64_t count, float* window) {
  const int64_t first = row0 - shape.before, valid = shape.valid(batch);
  for (int64_t r = 0; r < rows; ++r, window += kLine) {
    std::fill_n(window, kLine, 0.0f);
    const int64_t row = first + r;
    if (row < 0 || row >= valid) continue;
    const uint8_t* x = call.x + (batch * shape.length + row) * shape.channels + channel0;
    for (int64_t c = 0; c < count; ++c)
      window[c] = static_cast<float>(static_cast<int32_t>(x[c]) - call.zero_point);
  }
}

}  // namespace

int64_t depthwise_u8(const Quantised& call, uint8_t* h, const Shape& shape) {
  if (const int64_t bad = bad_length(shape); bad >= 0) return bad;
  if (shape.batch * shape.length == 0) return -1;
  const Kernel& kernel = select();
  const int64_t lines = lines_of(shape.channels);
  float* const taps = scratch<SharedLine>(lines * shape.width)->units;
  for (int64_t c = 0; c < lines * kLine; ++c)
    for (int j = 0; j < shape.width; ++j)
      taps[(c / kLine * shape.width + j) * kLine + c % kLine] =
          c < shape.channels ? static_cast<float>(call.depthwise[c * shape.width + j]) : 0.0f;
  const float low = static_cast<float>(-call.out_zero_point);
  const float high = static_cast<float>(255 - call.out_zero_point);
  const int64_t macs = shape.batch * shape.length * shape.channels * shape.width;
  const int threads = macs < kParallelMultiplyAdds ? 1 : num_threads();
  parallel_for(shape.batch * blocks_of(shape), 1, threads, [&](int64_t begin, int64_t end) {
    float* const window = scratch<Line>(kBlockRows + shape.width + kTileRows)->units;
    float* const sums = window + (kBlockRows + shape.width) * kLine;
    for (int64_t index = begin; index < end; ++index) {
      const Block block = block_of(shape, index);
      const int64_t batch0 = block.batch * shape.length;
      std::memset(h + (batch0 + block.beyond0) * shape.channels, call.out_zero_point,
                  block.beyond * shape.channels);
      for (int64_t line = 0; line < lines && block.rows; ++line) {
        const int64_t channel0 = line * kLine;
        const int64_t count = std::min<int64_t>(kLine, shape.channels - channel0);
        load_window(call, shape, block.batch, block.row0, block.rows + shape.width - 1, channel0,
                    count, window);
        for (int64_t r0 = 0; r0 < block.rows; r0 += kTileRows) {
          const int height = static_cast<int>(std::min<int64_t>(kTileRows, block.rows - r0));
          kernel.convolve(window + r0 * kLine, taps + line * shape.width * kLine, shape.width,
                          height, sums);
          for (int r = 0; r < height; ++r) {
            uint8_t* const to = h + (batch0 + block.row0 + r0 + r) * shape.channels + channel0;
            for (int64_t c = 0; c < count; ++c) {
              const float value = sums[r * kLine + c] * call.scale[channel0 + c];
              const float scaled = std::min(std::max(value * call.inverse_out_scale, low), high);
              to[c] = static_cast<uint8_t>(static_cast<int32_t>(round_half_even(scaled)) +
                                           call.out_zero_point);
            }
          }
        }
      }
    }
  });
  return -1;
}

}  // namespace fastrec::separable_projection
