// Few rows, written once over sixteen lanes; an ISA file includes its vec16 header, names
// FASTREC_DOT_ROWS, the rows whose sums its registers hold at once, and then includes this one.
//
// A row of the weight is read as it lies and multiplied with rows of x: no panel is packed, which
// would cost as much as reading the weight three times. Lanes are added at the end, so the order of
// the sum is not that of a tile.
#include <algorithm>

#include "grouped_linear/grouped_linear.h"

namespace fastrec::grouped_linear {
namespace {

constexpr int kDotColumns = 4;  // rows of the weight at a time: a load of x serves them all

FASTREC_VEC_INLINE Floats widened(const float* from) { return load(from); }
FASTREC_VEC_INLINE Floats widened(const float* from, Lanes lanes) { return load(from, lanes); }
FASTREC_VEC_INLINE Floats widened(const uint16_t* from) {
  return load_bf16(from, first_lanes(kLanes));
}
FASTREC_VEC_INLINE Floats widened(const uint16_t* from, Lanes lanes) {
  return load_bf16(from, lanes);
}

// acc[r][n] = the lanes of x[r] . weight[n], before they are added.
template <class T, int R>
FASTREC_VEC_INLINE void multiply_rows(const T* x, int64_t x_row,
                                      const T* const (&weight)[kDotColumns], int64_t inputs,
                                      Floats (&acc)[R][kDotColumns]) {
#pragma GCC unroll 2
  for (int r = 0; r < R; ++r)
#pragma GCC unroll 4
    for (int n = 0; n < kDotColumns; ++n) acc[r][n] = zeros();
  int64_t k = 0;
  for (; k + kLanes <= inputs; k += kLanes) {
    Floats value[R];
#pragma GCC unroll 2
    for (int r = 0; r < R; ++r) value[r] = widened(x + r * x_row + k);
#pragma GCC unroll 4
    for (int n = 0; n < kDotColumns; ++n) {
      const Floats factor = widened(weight[n] + k);
#pragma GCC unroll 2
      for (int r = 0; r < R; ++r) acc[r][n] = fma(value[r], factor, acc[r][n]);
    }
  }
  if (k == inputs) return;
  const Lanes tail = first_lanes(inputs - k);
#pragma GCC unroll 4
  for (int n = 0; n < kDotColumns; ++n) {
    const Floats factor = widened(weight[n] + k, tail);
#pragma GCC unroll 2
    for (int r = 0; r < R; ++r)
      acc[r][n] = fma(widened(x + r * x_row + k, tail), factor, acc[r][n]);
  }
}

// c[r][n] = start[n] + x[r] . weight[n] for n < columns <= 16.
template <class T, int R>
FASTREC_VEC __attribute__((noinline)) void dot_rows(const T* x, int64_t x_row, const T* weight,
                                                    int64_t inputs, int columns, const float* start,
                                                    float* c, int64_t c_row) {
  Floats sums[R][kLanes];
#pragma GCC unroll 4
  for (int n = 0; n < kLanes; n += kDotColumns) {
    // Beyond the last column the last one again, whose sums are not stored.
    const T* row[kDotColumns];
#pragma GCC unroll 4
    for (int i = 0; i < kDotColumns; ++i) row[i] = weight + std::min(n + i, columns - 1) * inputs;
    Floats acc[R][kDotColumns];
    multiply_rows<T, R>(x, x_row, row, inputs, acc);
#pragma GCC unroll 2
    for (int r = 0; r < R; ++r)
#pragma GCC unroll 4
      for (int i = 0; i < kDotColumns; ++i) sums[r][n + i] = acc[r][i];
  }
  const Lanes lanes = first_lanes(columns);
#pragma GCC unroll 2
  for (int r = 0; r < R; ++r)
    store(c + r * c_row, add(load(start, lanes), sum_rows(sums[r])), lanes);
}

template <class T>
FASTREC_VEC void dot_all(const T* x, int64_t x_row, const T* weight, int64_t inputs, int columns,
                         int rows, const float* start, float* c, int64_t c_row) {
  int r = 0;
  for (; r + FASTREC_DOT_ROWS <= rows; r += FASTREC_DOT_ROWS)
    dot_rows<T, FASTREC_DOT_ROWS>(x + r * x_row, x_row, weight, inputs, columns, start,
                                  c + r * c_row, c_row);
  for (; r < rows; ++r)
    dot_rows<T, 1>(x + r * x_row, x_row, weight, inputs, columns, start, c + r * c_row, c_row);
}

FASTREC_VEC void dot(const void* x, int64_t x_row, const void* weight, Dtype dtype, int64_t inputs,
                     int columns, int rows, const float* start, float* c, int64_t c_row) {
  if (dtype == Dtype::f32)
    dot_all(static_cast<const float*>(x), x_row, static_cast<const float*>(weight), inputs, columns,
            rows, start, c, c_row);
  else
    dot_all(static_cast<const uint16_t*>(x), x_row, static_cast<const uint16_t*>(weight), inputs,
            columns, rows, start, c, c_row);
}

}  // namespace
}  // namespace fastrec::grouped_linear
