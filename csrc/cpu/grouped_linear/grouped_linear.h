// grouped_linear: y[m, g, o] = bias[g, o] + sum_i x[m, g, i] * w[g, o, i]
//
// x [M, G * I], w [G, O, I] contiguous, bias [G * O] or null, y [M, G * O]; all f32 or all bf16,
// sums in f32, begun with the bias and taken in order of i; where rows are few (Kernel::few_rows)
// in sixteen sums, added at the end, that read the weight as it lies. Rows of x and y have a stride
// of their own; channel e of group g lies at g * channels.group + e * channels.element, so that a
// channel shuffle (position e * G + g) is a pair of strides. Backward: dx = dy w for each group, dw
// = dy^T x, and dbias, the sum of dy over the rows; in blocks of kChunkRows rows, each summed on
// its own, whose order depends on the sizes alone: the same bits for any number of threads. Kernels
// read nothing outside the rows and the weight given.
//
// A panel is 32 columns of a group's matrix, [K][32] units of 32 bits, zeros beyond the last
// column. A unit is an f32; where a kernel multiplies bf16 as it is (Kernel::unit_inputs == 2) it
// is a pair of bf16 of neighbouring k, zero beyond the last. A tile is up to 12 rows of one group's
// inputs, [ceil(K / 16)][rows][16] units, so that all rows lie at constant displacements.
#pragma once

#include <cstdint>

#include "isa.h"

namespace fastrec::grouped_linear {

inline constexpr int kPanelColumns = 32;
inline constexpr int kTileRows = 12;  // 24 accumulators + 2 weights + broadcasts <= 32 registers
inline constexpr int kLine = 16;      // units of one row that lie side by side in a tile

enum class Dtype : int { f32, bf16 };

struct Channels {
  int64_t group, element;
};

struct Matrix {
  const void* data;
  Dtype dtype;
  int64_t row_stride;  // in elements, as all strides here
  Channels channels;
};

// A unit of 32 bits is passed as float, also where it holds two bf16.
struct Kernel {
  Isa isa;
  int unit_inputs;
  // Row r of `from` (depth inputs, stride `element`) to lines of 16 units at to + r * row_step +
  // line
  // * line_step; what the last line has left is zeroed.
  void (*load)(const void* from, Dtype dtype, int64_t row_stride, int64_t element, int64_t depth,
               int rows, float* to, int64_t row_step, int64_t line_step);
  // c[r][n] = start[n] + sum_k tile[r][k] * panel[k][n], n < 16 * halves, k < depth units.
  void (*multiply)(const float* tile, const float* panel, int64_t depth, int rows, int halves,
                   const float* start, float* c, int64_t c_row);
  // c[r][n] += sum_k a[k * a_row + r] * b[k * b_row + n], f32 only; r < rows <= 12.
  void (*outer)(const float* a, int64_t a_row, const float* b, int64_t b_row, int64_t depth,
                int rows, int halves, float* c, int64_t c_row);
  // c[r][0..count) to `to`, converted (rounded to nearest even).
  void (*store)(const float* c, int64_t c_row, int rows, int count, void* to, Dtype dtype,
                int64_t row_stride, int64_t element);
  // c[r][n] = start[n] + x[r] . weight[n], n < columns <= 16; the weight as it lies, [n][inputs].
  // Null where few_rows, the rows up to which packing the weight costs more than it brings, is 0.
  void (*dots)(const void* x, int64_t x_row, const void* weight, Dtype dtype, int64_t inputs,
               int columns, int rows, const float* start, float* c, int64_t c_row);
  int few_rows;  // measured, see docs/kernels.md; <= kTileRows
};

void dots_avx2(const void* x, int64_t x_row, const void* weight, Dtype dtype, int64_t inputs,
               int columns, int rows, const float* start, float* c, int64_t c_row);
void dots_avx512(const void* x, int64_t x_row, const void* weight, Dtype dtype, int64_t inputs,
                 int columns, int rows, const float* start, float* c, int64_t c_row);

extern const Kernel kScalar, kAvx2, kAvx512, kAvx512bf16;

// The kernel that runs under the active ISA for this dtype. The outer product of bf16 is that of
// select(f32) on converted rows.
const Kernel& select(Dtype dtype);

struct Sizes {
  int64_t rows, groups, outputs, inputs;  // M, G, O, I
};

// Weights of all groups as panels, and the start of their sums; views into scratch memory.
struct Panels {
  const float* values;  // [groups][panels][depth][32]
  const float* start;   // [groups][panels][32]: the bias, else zeros
  int64_t groups, columns, depth, count;
  const float* of(int64_t group, int64_t panel) const {
    return values + (group * count + panel) * depth * kPanelColumns;
  }
};

int64_t panel_floats(const Kernel& kernel, int64_t groups, int64_t columns, int64_t depth_inputs);
// b(k, n) of group g is weight[g][n][k], or weight[g][k][n] where `columns_first` is false.
Panels pack(const Kernel& kernel, const void* weight, Dtype dtype, const void* bias, int64_t groups,
            int64_t columns, int64_t depth_inputs, bool columns_first, float* memory);

// Rows are cut into the fewest tiles, all of nearly the same height.
inline int64_t tile_row0(int64_t tile, int64_t rows, int64_t tiles) { return tile * rows / tiles; }
// One tile of one group times one panel, to rows row0.. of c.
void multiply_tile(const Kernel& kernel, const float* tile, int rows, const Panels& panels,
                   int64_t group, int64_t panel, const Matrix& c, int64_t row0);

void forward(const Matrix& x, const void* weight, const void* bias, const Matrix& y,
             const Sizes& sizes);
void input_gradient(const Matrix& dy, const void* weight, const Matrix& dx, const Sizes& sizes);
// dweight [G, O, I] and, unless null, dbias [G * O], of dy's dtype.
void weight_gradient(const Matrix& dy, const Matrix& x, void* dweight, void* dbias,
                     const Sizes& sizes);

}  // namespace fastrec::grouped_linear
