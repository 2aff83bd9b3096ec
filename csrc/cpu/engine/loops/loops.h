// Loops over elements that steps of the engine share: the blocks of a map, sums of rows, the cell
// of a recurrent layer. Written once in plain C++ (body.h) and compiled for each instruction set;
// only IEEE operations in a fixed order, so that all of them give the same bits.
//
// exp, tanh, sigmoid, silu and erf are our own (functions.h), with relative errors below 2.5e-7;
// the results for infinities and NaN are those of the C library. GELU is gelu.h's. All other
// functions are the C library's.
#pragma once

#include <cstdint>
#include <vector>

#include "engine/map_program.h"
#include "engine/tensor.h"
#include "isa.h"

namespace fastrec::engine::loops {

inline constexpr int kBlock = 256;  // elements

// A map over operands with as few dims as their strides allow; the result is operand `inputs`.
//
// A block is up to kBlock elements of the last dimension or, where that is shorter, as many whole
// rows of the dimension before it.
struct MapCall {
  const std::vector<MapInstruction>* program;
  const Tensor* operands;
  int inputs, dims;  // at least two
  int64_t sizes[kMaxDims];
  int64_t strides[kMaxRegisters + 1][kMaxDims];
  int64_t block_rows, block_width;

  int64_t blocks_along(int d) const {
    const int64_t step = d == dims - 1 ? block_width : d == dims - 2 ? block_rows : 1;
    return (sizes[d] + step - 1) / step;
  }
};

enum class Reduction { sum, mean, max, min };
enum class Cell { gru, lstm, tanh, relu };

struct Loops {
  Isa isa;
  // Blocks [begin, end) in the order of the dims. False where integers are divided by 0.
  bool (*map)(const MapCall& call, int64_t begin, int64_t end);
  // [count][width] to [width]; `total`: `width` doubles of scratch. Sums are of doubles, in order.
  void (*reduce)(Reduction reduction, const float* x, int64_t count, int64_t width, double* total,
                 float* result);
  // The next state of a user: `in` are the inputs' gates, `own` the hidden state's.
  void (*cell)(Cell cell, int64_t size, const float* in, const float* own, float* state);
};

extern const Loops kScalar, kAvx2, kAvx512;

const Loops& select();

}  // namespace fastrec::engine::loops
