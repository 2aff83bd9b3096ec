// Plain loops, any machine: the readable form of every vector kernel.
#include "separable_projection/separable_projection.h"

namespace fastrec::separable_projection {
namespace {

void convolve_rows(const float* x, const float* taps, int width, int rows, float* out) {
  for (int r = 0; r < rows; ++r)
    for (int c = 0; c < kLine; ++c) {
      float sum = 0.0f;
      for (int j = 0; j < width; ++j) sum += x[(r + j) * kLine + c] * taps[j * kLine + c];
      out[r * kLine + c] = sum;
    }
}

void correlate(const float* gradient, const float* x, int width, int64_t rows, float* taps) {
  for (int j = 0; j < width; ++j)
    for (int c = 0; c < kLine; ++c) {
      float sum = 0.0f;
      for (int64_t r = 0; r < rows; ++r) sum += gradient[r * kLine + c] * x[(r + j) * kLine + c];
      taps[j * kLine + c] += sum;
    }
}

}  // namespace

const Kernel kScalar = {Isa::scalar, convolve_rows, correlate};

}  // namespace fastrec::separable_projection
