// sparse_int8_linear:
//   y[m, n] = act(x_scale * w_scale[n] * (sum_k (x[m, k] - z) * w[n, k]) + bias[n])
//
// x  u8 [M, K] with zero point z; or f32 or bf16 [M, K], quantised on the way in:
//    u8 = clip(round_half_even(x * (1 / x_scale)) + z, 0, 255)
// w  s8 [N, K], one scale per output, packed (below)
// y  f32; or bf16, the f32 result rounded half to even; or u8 = clip(round(y / scale) + zero, 0,
//    255)
// Accumulator: i32, exact while K * 255 * 128 < 2^31, that is K <= kMaxInputs; callers enforce it.
// It begins with -z * sum_k w[n, k], so that intermediate sums may wrap; the final one does not.
// Every step outside the accumulator is one IEEE fp32 operation in the order written here, the
// same in every ISA file and in reference.py, so that all of them agree to the last bit (GELU
// aside: its erf is approximated to 4.3e-7 here, the same in all ISA files).
//
// Packed weight: panels of 32 outputs; of each panel only the kept groups of 4 inputs are stored.
//
//   values[group] = 128 bytes = two registers          group_index[group] = k / 4
//     byte  0.. 63: outputs  0-15 of the panel, 4 inputs each      panel p owns the groups
//     byte 64..127: outputs 16-31                                  panel_start[p] .. panel_start[p
//     + 1]
//
// A dense weight is the same format with every group kept. Outputs beyond N and inputs beyond K are
// 0.
//
// Tiled activations: rows are cut into tiles of at most the kernel's max_rows; a tile of R rows is
// stored as [ceil(K / 32)][R][32] elements (bytes, or 16 bits for a kernel without a dot product of
// bytes), so that a group of 4 inputs of all rows lies within R * 32 elements at constant
// displacements. Inputs beyond K are of no account: their weights are 0. A panel's outputs are as
// many as a chunk's inputs, so a layer can write the tiles that the next layer reads (u8_tiles),
// and neither pays for packing them. Kernels read nothing outside the input's rows, the tiles, the
// values of their panel, and the first N entries of the per-output arrays.
#pragma once

#include <cstdint>
#include <vector>

#include "isa.h"

namespace fastrec::sparse_int8_linear {

inline constexpr int kPanelOutputs = 32;
inline constexpr int kGroupInputs = 4;
inline constexpr int kGroupBytes = kPanelOutputs * kGroupInputs;
inline constexpr int kTileChunk = 32;         // inputs of one row that lie side by side in a tile
inline constexpr int kMaxTileRows = 12;       // of any kernel
inline constexpr int64_t kMaxInputs = 65793;  // floor((2^31 - 1) / (255 * 128))

enum class Activation : int { none, relu, gelu };
// u8_tiles: tiled activations, between two layers that run under the same ISA.
enum class Dtype : int { u8, f32, bf16, u8_tiles };

struct Weight {
  const int8_t* values;        // [groups][128]
  const int32_t* group_index;  // [groups], each in [0, ceil(K / 4))
  const int32_t* panel_start;  // [ceil(N / 32) + 1], from 0, never falling
  const float* scale;          // [N]
  const int32_t* sum;          // [N], sum of the kept weights of each output
  const float* bias;           // [N] or null
  int64_t outputs, inputs;     // N, K
};

struct Quantisation {
  float scale;
  int32_t zero_point;  // 0..255
};

// Per-output constants of a block, padded to whole panels.
struct Folded {
  const int32_t* start;  // -zero point * sum
  const float* scale;    // x_scale * w_scale
  const float* bias;     // -0 without a bias: adding it changes no value
};

// Makes and owns the folded values of a weight and its input's quantisation.
class Folding {
 public:
  Folding(const Weight& weight, Quantisation x);
  Folded folded() const { return {start_.data(), scale_.data(), bias_.data()}; }

 private:
  std::vector<int32_t> start_;
  std::vector<float> scale_, bias_;
};

struct Call {
  Weight weight;
  Folded folded;  // of the weight and x_quantisation
  const void* x;  // [M, K], rows contiguous
  Dtype x_dtype;
  Quantisation x_quantisation;
  int64_t rows;  // M
  Activation activation;
  void* y;  // [M, N], rows contiguous
  Dtype y_dtype;
  Quantisation y_quantisation;  // used where y is u8
};

// Rows are cut into the fewest tiles, all of nearly the same height.
struct Tiling {
  Tiling(int64_t rows, int max_rows) : rows(rows), count((rows + max_rows - 1) / max_rows) {}
  int64_t row0(int64_t tile) const { return tile * rows / count; }
  int height(int64_t tile) const { return static_cast<int>(row0(tile + 1) - row0(tile)); }

  int64_t rows, count;
};

// Elements of one row in a tile.
inline constexpr int64_t tile_row_elements(int64_t inputs) {
  return (inputs + kTileChunk - 1) / kTileChunk * kTileChunk;
}

// One block of work: the rows of one tile times the outputs of one panel.
struct Block {
  const void* tile;  // [ceil(K / 32)][rows][32]
  int64_t row0;
  int rows;  // 1..max_rows
  int64_t panel;
  int64_t tile_index, tiles;  // of how many this is which: each prefetches its share of a panel
};

struct Kernel {
  Isa isa;
  int max_rows;       // of a tile
  int element_bytes;  // of an activation in a tile
  // Quantises (if x is float) and lays out one tile of rows; false if an input is not a number.
  bool (*pack_tile)(const Call& call, int64_t row0, int rows, void* tile);
  void (*block)(const Call& call, const Block& block);
};

extern const Kernel kScalar;
extern const Kernel kAvx2;
extern const Kernel kAvxvnni;
extern const Kernel kAvx512;
extern const Kernel kAvx512vnni;

// The kernel that runs under the active ISA.
const Kernel& select();

// False if a float input held a NaN; y is then unspecified.
bool run(const Call& call);

}  // namespace fastrec::sparse_int8_linear
