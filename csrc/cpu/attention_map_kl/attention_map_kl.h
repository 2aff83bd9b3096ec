// attention_map_kl: for each (batch, head) the sum over valid rows i of KL(T_i || S_i)
//
// S_i is the softmax of student_scale * sq_i . sk_j over the valid keys j that AttentionPattern
// shows row i, and T_i that of teacher_scale * tq_i . tk_j over the same keys (only j <= i where
// the teacher is causal): the teacher's dense softmax, restricted to what the student can see and
// renormalised. Rows and keys at or beyond lengths[b] do not count and are never read.
//
//   kl       = sum_i sum_j T_ij (log T_ij - log S_ij)
//   d kl/dsq_i = student_scale * sum_j (S_ij - T_ij) sk_j
//   d kl/dsk_j = student_scale * sum_i (S_ij - T_ij) sq_i
//
// q and k f32 [B, H, L, D] with strides in floats, the D of a row contiguous (teacher's and
// student's D may differ); kl f32 [B, H]; dq, dk f32 [B, H, L, Ds], contiguous, both or neither.
// One thread works through one head in order: results do not depend on the number of threads.
// Scores of one block of rows at a time; scratch is O(L D) floats a thread, never L x L.
#pragma once

#include <cstdint>

#include "attention_pattern.h"
#include "isa.h"

namespace fastrec::attention_map_kl {

struct Rows {
  const float* data;
  int64_t batch_stride, head_stride, row_stride;
  int64_t dims;

  const float* head(int64_t batch, int64_t head) const {
    return data + batch * batch_stride + head * head_stride;
  }
};

struct Call {
  Rows teacher_q, teacher_k, student_q, student_k;
  float teacher_scale, student_scale;
  bool teacher_causal;
  float *kl, *dq, *dk;     // dq and dk may be null
  const int64_t* lengths;  // [B], each 0..L, or null: all of L
  AttentionPattern pattern;
  int64_t batch, heads, length;

  int64_t keys(int64_t batch_index) const { return lengths ? lengths[batch_index] : length; }
};

struct Kernel {
  Isa isa;
  // Floats of scratch that one thread needs; far: the most far keys of any head.
  int64_t (*scratch_floats)(const Call& call, int64_t far);
  void (*head)(const Call& call, int64_t batch, int64_t head, float* scratch);
};

extern const Kernel kScalar;
extern const Kernel kAvx2;
extern const Kernel kAvx512;

const Kernel& select();
// The first batch whose length lies outside 0..L, or -1 and all is written.
int64_t run(const Call& call);

}  // namespace fastrec::attention_map_kl
