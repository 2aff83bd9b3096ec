// Parameters of the kernel of sparse_int8_linear, filled in by the host; no device code.
#pragma once

#include "types.cuh"

namespace fastrec::sparse_int8_linear {

inline constexpr int kPanelOutputs = 32;
inline constexpr int kGroupInputs = 4;
// Of either form of the weight: 8 groups whole, or 16 of which half is kept.
inline constexpr int kStepBytes = 1024;
inline constexpr int kChunkInputs = 512;
// 4 banks further each row: 8 rows x 4 neighbouring groups lie in 32 different banks.
inline constexpr int kRowBytes = kChunkInputs + 16;
inline constexpr int kStages = 2;
// A row of sums of one panel, with the same end: written by (column, row), read in fours.
inline constexpr int kSumsRow = kPanelOutputs + 4;

enum Activation : int32_t { kNone, kRelu, kGelu };
enum Dtype : int32_t { kU8, kF32, kBf16 };

// Given by value; _cuda.py declares the same structure.
struct Params {
  const void* x;              // [M, K], rows contiguous
  void* y;                    // [M, N], rows contiguous
  const int8_t* values;       // [steps, 8, 32, 4]; 2:4: [steps, 2, 32 lanes, 16]
  const uint16_t* offset;     // [steps, 8 or 16]: the group's byte within its chunk of a row
  const int32_t* step_start;  // [panels, chunks + 1]
  const int32_t* start;       // [panels * 32]: -zero point * sum of the output's weights
  const float* scale;         // [panels * 32]: x_scale * w_scale
  const float* bias;          // [panels * 32]; -0 where there is none
  const uint32_t* meta;       // 2:4: [steps, 2, 32 lanes], else null
  int64_t rows;
  int32_t outputs, inputs, panels, chunks;
  int32_t x_dtype, y_dtype, activation;
  int32_t x_zero_point, y_zero_point;
  float x_inverse_scale, y_inverse_scale;
  int32_t x_alignment, y_alignment;  // of every row, in bytes: 16, 4 or 1
};

// The instantiations that are compiled: X(rows, wide, panels, slices, ahead, bands, two_four), see
// multiply. _config.py chooses among them.
#define FASTREC_SPARSE_INT8_LINEAR(X) \
  X(8, 1, 1, 8, 2, 1, false)          \
  X(16, 1, 1, 8, 2, 1, false)         \
  X(32, 1, 2, 4, 2, 1, false)         \
  X(32, 2, 2, 4, 1, 1, false)         \
  X(64, 1, 4, 2, 1, 1, false)         \
  X(64, 2, 4, 1, 1, 1, false)         \
  X(64, 1, 8, 1, 1, 1, false)         \
  X(128, 2, 4, 1, 1, 2, false)        \
  X(128, 1, 8, 1, 1, 2, false)        \
  X(8, 1, 1, 8, 1, 1, true)           \
  X(16, 1, 1, 8, 1, 1, true)          \
  X(32, 2, 2, 4, 1, 1, true)          \
  X(64, 1, 4, 2, 1, 1, true)          \
  X(64, 2, 4, 1, 1, 1, true)          \
  X(128, 2, 4, 1, 1, 2, true)         \
  X(128, 1, 8, 1, 1, 2, true)

FASTREC_HOST_DEVICE constexpr int max_of(int a, int b) { return a > b ? a : b; }

// Bytes of shared memory of a block, and its threads.
FASTREC_HOST_DEVICE constexpr int shared_bytes(int rows, int wide, int panels, int slices) {
  return max_of(kStages * rows * kRowBytes, slices * panels * wide * rows * kSumsRow * 4);
}
FASTREC_HOST_DEVICE constexpr int block_threads(int panels, int slices, int bands) {
  return 32 * panels * slices * bands;
}

}  // namespace fastrec::sparse_int8_linear
