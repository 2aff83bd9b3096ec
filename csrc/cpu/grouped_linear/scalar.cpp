// Plain loops, any machine: the readable form of every vector kernel.
#include <algorithm>

#include "grouped_linear/bf16.h"
#include "grouped_linear/grouped_linear.h"

namespace fastrec::grouped_linear {
namespace {

void load(const void* from, Dtype dtype, int64_t row_stride, int64_t element, int64_t depth,
          int rows, float* to, int64_t row_step, int64_t line_step) {
  for (int r = 0; r < rows; ++r)
    for (int64_t k0 = 0; k0 < depth; k0 += kLine) {
      float* line = to + r * row_step + k0 / kLine * line_step;
      const int64_t count = std::min<int64_t>(kLine, depth - k0);
      for (int64_t k = 0; k < count; ++k) {
        const int64_t at = r * row_stride + (k0 + k) * element;
        line[k] = dtype == Dtype::f32 ? static_cast<const float*>(from)[at]
                                      : from_bf16(static_cast<const uint16_t*>(from)[at]);
      }
      std::fill(line + count, line + kLine, 0.0f);
    }
}

void multiply(const float* tile, const float* panel, int64_t depth, int rows, int halves,
              const float* start, float* c, int64_t c_row) {
  const int columns = halves * kLine;
  for (int r = 0; r < rows; ++r) {
    float sums[kPanelColumns];
    std::copy(start, start + columns, sums);
    for (int64_t k = 0; k < depth; ++k) {
      const float x = tile[(k / kLine * rows + r) * kLine + k % kLine];
      for (int n = 0; n < columns; ++n) sums[n] += x * panel[k * kPanelColumns + n];
    }
    std::copy(sums, sums + columns, c + r * c_row);
  }
}

void outer(const float* a, int64_t a_row, const float* b, int64_t b_row, int64_t depth, int rows,
           int halves, float* c, int64_t c_row) {
  const int columns = halves * kLine;
  for (int r = 0; r < rows; ++r) {
    float sums[kPanelColumns] = {};
    for (int64_t k = 0; k < depth; ++k)
      for (int n = 0; n < columns; ++n) sums[n] += a[k * a_row + r] * b[k * b_row + n];
    for (int n = 0; n < columns; ++n) c[r * c_row + n] += sums[n];
  }
}

void store(const float* c, int64_t c_row, int rows, int count, void* to, Dtype dtype,
           int64_t row_stride, int64_t element) {
  for (int r = 0; r < rows; ++r)
    for (int n = 0; n < count; ++n) {
      const float value = c[r * c_row + n];
      const int64_t at = r * row_stride + n * element;
      if (dtype == Dtype::f32)
        static_cast<float*>(to)[at] = value;
      else
        static_cast<uint16_t*>(to)[at] = to_bf16(value);
    }
}

}  // namespace

const Kernel kScalar = {Isa::scalar, 1, load, multiply, outer, store, nullptr, 0};

}  // namespace fastrec::grouped_linear
