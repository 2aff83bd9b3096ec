#include "separable_projection/windows.h"

#include "grouped_linear/bf16.h"

namespace fastrec::separable_projection {

void load_window(const grouped_linear::Kernel& kernel, const Sequences& x, const Shape& shape,
                 int64_t batch, int64_t row0, int64_t rows, int64_t channel0, int64_t channels,
                 float* window) {
  const int64_t first = row0 - shape.before, last = first + rows;
  const int64_t from = std::clamp<int64_t>(first, 0, shape.valid(batch));
  const int64_t to = std::clamp<int64_t>(last, from, shape.valid(batch));
  const int64_t line_floats = rows * kLine;
  if (to > from) {
    const int64_t at = batch * x.batch_stride + from * x.row_stride + channel0;
    kernel.load(static_cast<const char*>(x.data) + at * element_bytes(x.dtype), x.dtype,
                x.row_stride, 1, channels, static_cast<int>(to - from),
                window + (from - first) * kLine, kLine, line_floats);
  }
  for (int64_t line = 0; line < lines_of(channels); ++line) {
    float* const begin = window + line * line_floats;
    std::fill(begin, begin + (from - first) * kLine, 0.0f);
    std::fill(begin + (to - first) * kLine, begin + line_floats, 0.0f);
  }
}

void pack_taps(const void* depthwise, Dtype dtype, bool flipped, int64_t groups, int64_t channels,
               int width, float* taps) {
  for (int64_t g = 0; g < groups; ++g)
    for (int64_t c0 = 0; c0 < channels; c0 += kLine)
      for (int j = 0; j < width; ++j)
        for (int64_t c = c0; c < c0 + kLine; ++c, ++taps) {
          const int64_t at = (g * channels + c) * width + (flipped ? width - 1 - j : j);
          if (c >= channels)
            *taps = 0.0f;
          else
            *taps = dtype == Dtype::f32 ? static_cast<const float*>(depthwise)[at]
                                        : from_bf16(static_cast<const uint16_t*>(depthwise)[at]);
        }
}

}  // namespace fastrec::separable_projection
