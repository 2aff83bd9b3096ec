// padded_attention: out[b, i, h] = sum_j softmax_j(scale * q[b, i, h] . k[b, j, h]) v[b, j, h], j <
// lengths[b]
//
// q f32 [B, H, Lq, D], k and v f32 [B, H, Lk, D]: the D floats of a row are contiguous; rows, heads
// and batches have strides of their own (in floats), so that views into a merged projection need no
// copy. out f32 [B, Lq, H, D] is contiguous.
// Masked keys (j >= lengths[b]) cost nothing and may hold anything, NaN too. A batch of length 0
// gives zeros. Accumulators and softmax in fp32, the row's maximum subtracted first; scratch is
// O(Lk * D) a thread, never Lq x Lk. Kernels read nothing outside the given rows.
#pragma once

#include <cstdint>

#include "isa.h"

namespace fastrec::padded_attention {

struct Rows {
  const float* data;
  int64_t batch_stride, head_stride, row_stride;  // in floats
};

struct Call {
  Rows q, k, v;
  float* out;              // [B, Lq, H, D]
  const int64_t* lengths;  // [B], each 0..Lk, or null: all of Lk
  int64_t batch, query_rows, key_rows, heads, head_dim;
  float scale;
};

// Query rows [begin, end) of one head of one batch.
struct Part {
  int64_t batch, head, begin, end;
};

struct Kernel {
  Isa isa;
  // Floats of scratch one thread needs for this many valid keys.
  int64_t (*scratch_floats)(int64_t keys, int64_t head_dim);
  void (*part)(const Call& call, const Part& part, float* scratch);
};

extern const Kernel kScalar;
extern const Kernel kAvx2;
extern const Kernel kAvx512;

const Kernel& select();
// The first batch whose length lies outside 0..Lk, or -1 and out is written.
int64_t run(const Call& call);

}  // namespace fastrec::padded_attention
