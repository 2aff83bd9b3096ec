// layer_norm_quantize: s = x + residual; y = (s - mean(s)) * rstd(s) * weight + bias, as u8 or f32
//
// x and residual f32 [rows, D] contiguous, weight and bias f32 [D], sum f32 [rows, D], y u8 or f32
// [rows, D]; residual, weight, bias and sum may be null. sum may be x or residual (in place), and
// so may an f32 y where sum is null. Nothing outside the rows is read or written.
//
// Every instruction set gives the same bits: element i of a row belongs to accumulator i / 16 % 4,
// lane i % 16; each adds its elements in order, from 0; accumulators add as (0 + 1) + (2 + 3),
// lanes as i + (i + 8), then 4, 2, 1. mean = sum / D; the variance adds (s - mean)^2 in the same
// order, a product and a sum rounded each; rstd = 1 / sqrt(variance / D + eps); y = ((s - mean) *
// rstd) * weight + bias, each step rounded. Accumulators are fp32.
#pragma once

#include <cstdint>

#include "isa.h"
#include "quantisation.h"

namespace fastrec::layer_norm_quantize {

struct Call {
  const float* x;
  const float* residual;
  const float* weight;
  const float* bias;
  float* sum;
  void* y;
  bool y_u8;
  Quantisation quantisation;  // of a u8 y
  float eps;
  int64_t rows, dims;
};

struct Kernel {
  Isa isa;
  // Rows [begin, end). False if a value to be quantised is a NaN: y is then undefined.
  bool (*rows)(const Call& call, int64_t begin, int64_t end);
};

extern const Kernel kScalar;
extern const Kernel kAvx2;
extern const Kernel kAvx512;

const Kernel& select();
// All rows, on the thread pool; false as above.
bool run(const Call& call);

}  // namespace fastrec::layer_norm_quantize
