// separable_projection: h[b, l, c] = sum_j depthwise[c, j] * x[b, l + j - before, c]
//                       y[b, l] = grouped_linear(h[b, l])
//
// x [B, L, C] with strides of its own, channels contiguous; depthwise [C, W], 1 <= W <= kMaxWidth;
// pointwise [G, O, I] with C = G * I, bias [G * O] or null; y [B, L, G * O] contiguous; all f32 or
// all bf16, sums and h in f32 (where grouped_linear's kernel multiplies bf16 as it is, h is rounded
// to bf16, as it is between two layers). `before` of the W taps look back: W / 2 for a centred
// kernel, W - 1 for a causal one. Rows l >= lengths[b] (and l < 0, l >= L) count as zeros and are
// never read; y is zero there. h never leaves a block of rows in L1 and L2.
#pragma once

#include <cstdint>

#include "grouped_linear/grouped_linear.h"
#include "isa.h"

namespace fastrec::separable_projection {

using grouped_linear::Dtype;
using grouped_linear::kLine;

inline constexpr int kMaxWidth = 31;

struct Kernel {
  Isa isa;
  // out[r][16] = sum_j x[r + j][16] * taps[j][16], rows <= 12
  void (*convolve)(const float* x, const float* taps, int width, int rows, float* out);
  // taps[j][16] += sum_r gradient[r][16] * x[r + j][16]
  void (*correlate)(const float* gradient, const float* x, int width, int64_t rows, float* taps);
};

extern const Kernel kScalar, kAvx2, kAvx512;
const Kernel& select();

// Rows of channels: [B, L, C].
struct Sequences {
  const void* data;
  Dtype dtype;
  int64_t batch_stride, row_stride;  // in elements
};

struct Shape {
  int64_t batch, length, channels;  // B, L, C
  int width, before;                // W
  const int64_t* lengths;           // [B] or null
  int64_t valid(int64_t b) const { return lengths ? lengths[b] : length; }
};

// All return the first batch whose length lies outside 0..L (and write nothing), or -1.
int64_t forward(const Sequences& x, const void* depthwise, const void* pointwise, const void* bias,
                void* y, const Shape& shape, int64_t groups, int64_t outputs);
// h alone, contiguous. Where `flipped`, with the taps in reverse: the gradient of the convolution.
int64_t convolve(const Sequences& x, const void* depthwise, Dtype depthwise_dtype, bool flipped,
                 void* h, Dtype h_dtype, const Shape& shape);
// ddepthwise [C, W] (of `to`) = sum_{b, l} dh[b, l, c] * x[b, l + j - before, c]; dh [B, L, C] f32
// contiguous. Summed in an order that depends on the sizes alone.
int64_t depthwise_gradient(const float* dh, const Sequences& x, void* ddepthwise, Dtype to,
                           const Shape& shape);

}  // namespace fastrec::separable_projection
