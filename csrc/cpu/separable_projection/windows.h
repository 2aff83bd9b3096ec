// Rows of a few channels copied out of sequences, zeros outside the sequence, for the kernels.
#pragma once

#include <algorithm>

#include "scratch.h"
#include "separable_projection/separable_projection.h"

namespace fastrec::separable_projection {

inline constexpr int64_t kBlockRows = 96;  // 8 tiles of 12

inline int64_t lines_of(int64_t channels) { return (channels + kLine - 1) / kLine; }
inline int64_t element_bytes(Dtype dtype) { return dtype == Dtype::f32 ? 4 : 2; }

// Work is cut into blocks of at most kBlockRows rows of one sequence: block k of the valid rows,
// and its share of those beyond the length.
struct Block {
  int64_t batch, row0, rows, beyond0, beyond;
};
inline int64_t blocks_of(const Shape& shape) {
  return (shape.length + kBlockRows - 1) / kBlockRows;
}
inline Block block_of(const Shape& shape, int64_t index) {
  const int64_t blocks = blocks_of(shape), k = index % blocks, b = index / blocks;
  const int64_t valid = shape.valid(b), beyond = shape.length - valid;
  const int64_t row0 = k * valid / blocks, beyond0 = k * beyond / blocks;
  return {b, row0, (k + 1) * valid / blocks - row0, valid + beyond0,
          (k + 1) * beyond / blocks - beyond0};
}

// Rows [row0 - before, row0 - before + rows) of `channels` channels from channel0 on, to
// [lines][rows][16].
void load_window(const grouped_linear::Kernel& kernel, const Sequences& x, const Shape& shape,
                 int64_t batch, int64_t row0, int64_t rows, int64_t channel0, int64_t channels,
                 float* window);

// depthwise [C, W] to [groups][lines][W][16], zeros beyond a group's channels.
void pack_taps(const void* depthwise, Dtype dtype, bool flipped, int64_t groups, int64_t channels,
               int width, float* taps);

// The first batch whose length lies outside 0..L, or -1.
inline int64_t bad_length(const Shape& shape) {
  for (int64_t b = 0; shape.lengths && b < shape.batch; ++b)
    if (shape.lengths[b] < 0 || shape.lengths[b] > shape.length) return b;
  return -1;
}

// Scratch of a thread, and of a caller while its threads use theirs.
struct alignas(64) Line {
  float units[kLine];
};
struct alignas(64) SharedLine {
  float units[kLine];
};

}  // namespace fastrec::separable_projection
