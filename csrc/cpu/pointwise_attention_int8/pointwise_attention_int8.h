// pointwise_attention_int8: pointwise_attention in 8-bit integers, forward only.
//
//   s = q[i] . k[j]                       exact, int32
//   x = s * score_scale + position + time, w = x * 1 / (1 + e^-x)
//   out[i] = sum_j w[j] v[j] * out_scale
//
// q, k s8 [rows, D], v s8 [rows, Dv], out f32; who sees whom, biases, layouts and lengths are those
// of pointwise_attention.h. Weights are rounded to s8 in runs of kRun keys (the history's from 0
// on, then a target itself): with m the largest |w| of the run that the row sees, at least 2^-100,
// w8 = round(w * (127 / m)), sums of w8 v are exact, and the row adds float(sum) * (m / 127).
//
// Every float step is one IEEE operation in this order, none fused, rounding half to even:
//   x = float(s) * score_scale (+ position) (+ time)
//   p = min(max(x * -log2(e), -126), 126), n = round(p), r = p - n
//   e = ((((((c6 r + c5) r + c4) r + c3) r + c2) r + c1) r + 1) * 2^n, w = x * (1 / (1 + e))
// so that all instruction sets and the reference agree to the last bit.
//
// Overflow: |s| <= 256 * 2^14 = 2^22; a run's sum is at most 64 * 127 * 128 < 2^20.
#pragma once

#include "pointwise_attention/pointwise_attention.h"

namespace fastrec::pointwise_attention_int8 {

using pointwise_attention::Bad;
using pointwise_attention::Bias;
using pointwise_attention::Part;
using pointwise_attention::Result;
using pointwise_attention::Rows;
using pointwise_attention::Sequence;
using pointwise_attention::Shape;
using pointwise_attention::Tables;
using pointwise_attention::View;

constexpr int64_t kMaxDims = 256, kRun = 64;
constexpr float kSmallest = 0x1p-100f, kMinusLog2E = -1.44269504088896341f;
// 2^r, |r| <= 1/2, by falling powers of r.
constexpr float kPower[] = {1.535336188319500e-4f,
                            1.339887440266574e-3f,
                            9.618437357674640e-3f,
                            5.550332471162809e-2f,
                            2.402264791363012e-1f,
                            6.931472028550421e-1f,
                            1.0f};

struct Call {
  Shape shape;  // its dtype is not looked at
  Bias bias;
  float score_scale, out_scale;
  bool causal;
  View q, k, v, out;
};

struct Kernel {
  Isa isa;
  // Bytes that the keys and values of one head of `rows` rows take, a multiple of 64.
  int64_t (*packed_bytes)(const Call& call, int64_t rows);
  int64_t (*scratch_floats)(const Call& call);
  void (*pack)(const Call& call, const Sequence& sequence, int64_t head, uint8_t* to);
  // packed: of the sequence's first head, the others follow.
  void (*forward)(const Call& call, const Tables& tables, const Part& part, const uint8_t* packed,
                  float* scratch);
};

extern const Kernel kScalar;
extern const Kernel kAvx2;
extern const Kernel kAvx512vnni;

const Kernel& select();
Result forward(const Call& call);

}  // namespace fastrec::pointwise_attention_int8
