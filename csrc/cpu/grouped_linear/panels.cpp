// Weights into panels: read once a call, next to nothing beside the rows they meet.
#include <algorithm>
#include <cstring>

#include "grouped_linear/bf16.h"
#include "grouped_linear/grouped_linear.h"

#if defined(__x86_64__)
#include <xmmintrin.h>
#endif

namespace fastrec::grouped_linear {
namespace {

// Columns at a time when transposing: a line of the panel is written whole.
constexpr int64_t kBlock = 16;

struct Group {
  int64_t columns, depth;  // depth in inputs
  int64_t column_stride, depth_stride;
};

template <class T>
float to_float(T value) {
  if constexpr (sizeof(T) == 2)
    return from_bf16(value);
  else
    return value;
}

template <class T>
void pack_f32(const T* weight, const Group& group, int64_t column0, int64_t count, float* panel) {
  const T* from = weight + column0 * group.column_stride;
  if (group.column_stride == 1) {
    for (int64_t k = 0; k < group.depth; ++k, panel += kPanelColumns) {
      for (int64_t n = 0; n < count; ++n) panel[n] = to_float(from[k * group.depth_stride + n]);
      std::fill(panel + count, panel + kPanelColumns, 0.0f);
    }
    return;
  }
  int64_t done = 0;
#if defined(__x86_64__)
  // SSE, which every x86-64 has: a call of few rows is mostly this.
  if constexpr (sizeof(T) == sizeof(float)) {
    if (count == kPanelColumns) {
      for (; done + 4 <= group.depth; done += 4)
        for (int64_t n = 0; n < kPanelColumns; n += 4) {
          const float* corner = from + n * group.column_stride + done;
          __m128 a = _mm_loadu_ps(corner), b = _mm_loadu_ps(corner + group.column_stride);
          __m128 c = _mm_loadu_ps(corner + 2 * group.column_stride);
          __m128 d = _mm_loadu_ps(corner + 3 * group.column_stride);
          _MM_TRANSPOSE4_PS(a, b, c, d);
          float* const to = panel + done * kPanelColumns + n;
          _mm_storeu_ps(to, a);
          _mm_storeu_ps(to + kPanelColumns, b);
          _mm_storeu_ps(to + 2 * kPanelColumns, c);
          _mm_storeu_ps(to + 3 * kPanelColumns, d);
        }
    }
  }
#endif
  for (int64_t k0 = done; k0 < group.depth; k0 += kBlock) {
    const int64_t last = std::min(k0 + kBlock, group.depth);
    for (int64_t n = 0; n < kPanelColumns; ++n) {
      const T* row = from + n * group.column_stride;
      for (int64_t k = k0; k < last; ++k)
        panel[k * kPanelColumns + n] = n < count ? to_float(row[k]) : 0.0f;
    }
  }
}

void pack_pairs(const uint16_t* weight, const Group& group, int64_t column0, int64_t count,
                float* panel) {
  const uint16_t* from = weight + column0 * group.column_stride;
  if (group.depth_stride == 1 && group.depth % 8 == 0 && count == kPanelColumns) {
    // Whole pairs lie side by side: units to transpose, of either dtype.
    const Group pairs = {group.columns, group.depth / 2, group.column_stride / 2, 1};
    pack_f32(reinterpret_cast<const float*>(from), pairs, 0, count, panel);
    return;
  }
  for (int64_t k = 0; k < group.depth; k += 2, panel += kPanelColumns)
    for (int64_t n = 0; n < kPanelColumns; ++n) {
      uint16_t pair[2] = {0, 0};
      for (int64_t i = 0; i < 2 && n < count && k + i < group.depth; ++i)
        pair[i] = from[n * group.column_stride + (k + i) * group.depth_stride];
      std::memcpy(panel + n, pair, sizeof(pair));
    }
}

int64_t units(const Kernel& kernel, int64_t inputs) {
  return (inputs + kernel.unit_inputs - 1) / kernel.unit_inputs;
}

}  // namespace

int64_t panel_floats(const Kernel& kernel, int64_t groups, int64_t columns, int64_t depth_inputs) {
  const int64_t count = (columns + kPanelColumns - 1) / kPanelColumns;
  return groups * count * (units(kernel, depth_inputs) + 1) * kPanelColumns;
}

Panels pack(const Kernel& kernel, const void* weight, Dtype dtype, const void* bias, int64_t groups,
            int64_t columns, int64_t depth_inputs, bool columns_first, float* memory) {
  const int64_t count = (columns + kPanelColumns - 1) / kPanelColumns;
  const int64_t depth = units(kernel, depth_inputs);
  const Group group = {columns, depth_inputs, columns_first ? depth_inputs : 1,
                       columns_first ? 1 : columns};
  float* start = memory + groups * count * depth * kPanelColumns;
  float* panel = memory;
  const Panels panels = {memory, start, groups, columns, depth, count};
  for (int64_t g = 0; g < groups; ++g)
    for (int64_t n = 0; n < columns; n += kPanelColumns) {
      const int64_t used = std::min<int64_t>(kPanelColumns, columns - n);
      const int64_t matrix = g * columns * depth_inputs, at = g * columns + n;
      std::fill_n(start, kPanelColumns, 0.0f);
      if (dtype == Dtype::f32) {
        pack_f32(static_cast<const float*>(weight) + matrix, group, n, used, panel);
        if (bias) std::copy_n(static_cast<const float*>(bias) + at, used, start);
      } else {
        const auto* bits = static_cast<const uint16_t*>(weight) + matrix;
        if (kernel.unit_inputs == 2)
          pack_pairs(bits, group, n, used, panel);
        else
          pack_f32(bits, group, n, used, panel);
        if (bias)
          std::transform(static_cast<const uint16_t*>(bias) + at,
                         static_cast<const uint16_t*>(bias) + at + used, start, from_bf16);
      }
      panel += depth * kPanelColumns;
      start += kPanelColumns;
    }
  return panels;
}

}  // namespace fastrec::grouped_linear
