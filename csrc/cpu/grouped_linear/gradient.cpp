// dw = dy^T x: each group's matrix is cut into blocks of 64 x 64, the rows into slices; a block of
// a slice is summed by one thread, the slices are added in order.
#include <algorithm>
#include <cstring>

#include "grouped_linear/bf16.h"
#include "grouped_linear/grouped_linear.h"
#include "parallel.h"
#include "scratch.h"

namespace fastrec::grouped_linear {
namespace {

constexpr int64_t kChunkRows = 128;  // of x and dy that stay in L1 and L2 while a block meets them
constexpr int64_t kBlock = 64;
// Enough parts for many threads, and slices long enough that adding them costs nothing.
constexpr int64_t kParts = 32;
constexpr int64_t kSliceRows = 8 * kChunkRows;
constexpr int64_t kParallelMultiplyAdds = 1'000'000;

// [64][64] of dw, then 64 of dbias.
constexpr int64_t kPartFloats = kBlock * kBlock + kBlock;

struct alignas(64) Chunk {
  float rows[2 * kChunkRows * kBlock];
};

struct Rows {
  const float* data;
  int64_t row_stride;
};

int64_t element_bytes(Dtype dtype) { return dtype == Dtype::f32 ? 4 : 2; }

// `width` channels of one group as f32 rows whose last vector may be read whole; copied if need be.
Rows rows_of(const Kernel& kernel, const Matrix& from, int64_t group, int64_t channel0,
             int64_t width, int64_t row0, int64_t rows, float* copy) {
  const int64_t at =
      row0 * from.row_stride + group * from.channels.group + channel0 * from.channels.element;
  const char* const data = static_cast<const char*>(from.data) + at * element_bytes(from.dtype);
  if (from.dtype == Dtype::f32 && from.channels.element == 1 && width % kLine == 0)
    return {reinterpret_cast<const float*>(data), from.row_stride};
  kernel.load(data, from.dtype, from.row_stride, from.channels.element, width,
              static_cast<int>(rows), copy, kBlock, kLine);
  return {copy, kBlock};
}

struct Part {
  int64_t group, output0, outputs, input0, inputs, row0, row1;
};

void sum_part(const Kernel& kernel, const Matrix& dy, const Matrix& x, const Part& part,
              float* sums) {
  std::fill_n(sums, kPartFloats, 0.0f);
  const float one = 1.0f;
  Chunk* const copies = scratch<Chunk>(1);
  const int64_t tiles = (part.outputs + kTileRows - 1) / kTileRows;
  for (int64_t row = part.row0; row < part.row1; row += kChunkRows) {
    const int64_t depth = std::min(kChunkRows, part.row1 - row);
    const Rows a =
        rows_of(kernel, dy, part.group, part.output0, part.outputs, row, depth, copies->rows);
    const Rows b = rows_of(kernel, x, part.group, part.input0, part.inputs, row, depth,
                           copies->rows + kChunkRows * kBlock);
    for (int64_t i = 0; i < part.inputs; i += kPanelColumns) {
      const int halves = part.inputs - i > kLine ? 2 : 1;
      for (int64_t t = 0; t < tiles; ++t) {
        const int64_t o = tile_row0(t, part.outputs, tiles);
        const int height = static_cast<int>(tile_row0(t + 1, part.outputs, tiles) - o);
        kernel.outer(a.data + o, a.row_stride, b.data + i, b.row_stride, depth, height, halves,
                     sums + o * kBlock + i, kBlock);
      }
    }
    // Column sums are an outer product with ones.
    if (part.input0 == 0)
      for (int64_t o = 0; o < part.outputs; o += kPanelColumns)
        kernel.outer(&one, 0, a.data + o, a.row_stride, depth, 1, part.outputs - o > kLine ? 2 : 1,
                     sums + kBlock * kBlock + o, kBlock);
  }
}

void store_row(const float* sums, int64_t count, void* to, int64_t at, Dtype dtype) {
  if (dtype == Dtype::f32)
    std::copy_n(sums, count, static_cast<float*>(to) + at);
  else
    std::transform(sums, sums + count, static_cast<uint16_t*>(to) + at, to_bf16);
}

}  // namespace

void weight_gradient(const Matrix& dy, const Matrix& x, void* dweight, void* dbias,
                     const Sizes& sizes) {
  const Kernel& kernel = select(Dtype::f32);
  const int64_t output_blocks = (sizes.outputs + kBlock - 1) / kBlock;
  const int64_t input_blocks = (sizes.inputs + kBlock - 1) / kBlock;
  const int64_t blocks = sizes.groups * output_blocks * input_blocks;
  const int64_t slices = std::max<int64_t>(1, std::min(kParts / blocks, sizes.rows / kSliceRows));
  const int64_t chunks = (sizes.rows + kChunkRows - 1) / kChunkRows;
  float* const sums = scratch<float>(blocks * slices * kPartFloats);

  const auto part_of = [&](int64_t block, int64_t slice) {
    const int64_t i = block % input_blocks, o = block / input_blocks % output_blocks;
    const auto row = [&](int64_t s) {
      return std::min(s * chunks / slices * kChunkRows, sizes.rows);
    };
    return Part{block / input_blocks / output_blocks,
                o * kBlock,
                std::min(kBlock, sizes.outputs - o * kBlock),
                i * kBlock,
                std::min(kBlock, sizes.inputs - i * kBlock),
                row(slice),
                row(slice + 1)};
  };
  const int64_t macs = sizes.rows * sizes.groups * sizes.outputs * sizes.inputs;
  const int threads = macs < kParallelMultiplyAdds ? 1 : num_threads();
  parallel_for(blocks * slices, 1, threads, [&](int64_t begin, int64_t end) {
    for (int64_t p = begin; p < end; ++p)
      sum_part(kernel, dy, x, part_of(p % blocks, p / blocks), sums + p * kPartFloats);
  });
  parallel_for(blocks, 1, threads, [&](int64_t begin, int64_t end) {
    for (int64_t b = begin; b < end; ++b) {
      const Part part = part_of(b, 0);
      float* const total = sums + b * kPartFloats;
      for (int64_t s = 1; s < slices; ++s) {
        const float* const more = sums + (s * blocks + b) * kPartFloats;
        for (int64_t i = 0; i < kPartFloats; ++i) total[i] += more[i];
      }
      for (int64_t o = 0; o < part.outputs; ++o)
        store_row(total + o * kBlock, part.inputs, dweight,
                  (part.group * sizes.outputs + part.output0 + o) * sizes.inputs + part.input0,
                  dy.dtype);
      if (dbias && part.input0 == 0)
        store_row(total + kBlock * kBlock, part.outputs, dbias,
                  part.group * sizes.outputs + part.output0, dy.dtype);
    }
  });
}

}  // namespace fastrec::grouped_linear
