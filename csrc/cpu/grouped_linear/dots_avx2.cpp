#if defined(__x86_64__)
#include "vec16_avx2.h"
// After the lanes it is written over.
#define FASTREC_DOT_ROWS 1
#include "grouped_linear/dots.h"

namespace fastrec::grouped_linear {

void dots_avx2(const void* x, int64_t x_row, const void* weight, Dtype dtype, int64_t inputs,
               int columns, int rows, const float* start, float* c, int64_t c_row) {
  dot(x, x_row, weight, dtype, inputs, columns, rows, start, c, c_row);
}

}  // namespace fastrec::grouped_linear
#endif
