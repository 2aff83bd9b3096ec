// padded_attention: out[b, i, h] = sum_j softmax_j(scale * q[b, i, h] . k[b, j, h] + mask[b, h, i,
// j]) v[b, j, h], starts[b] <= j < lengths[b]
//
// q f32 [B, H, Lq, D], k and v f32 [B, H, Lk, D]: the D floats of a row are contiguous; rows, heads
// and batches have strides of their own (in floats), so that views into a merged projection need no
// copy. out f32 [B, Lq, H, D] is contiguous.
// Keys outside starts and lengths cost nothing and may hold anything, NaN too. A batch without keys
// gives zeros (or NaN, Call::nothing), and so does a row whose mask is -inf for all of them.
// Accumulators and softmax in fp32, the row's maximum subtracted first; scratch is O(Lk * D) a
// thread, never Lq x Lk. Kernels read nothing outside the given rows.
#pragma once

#include <cstdint>
#include <limits>

#include "isa.h"

namespace fastrec::padded_attention {

struct Rows {
  const float* data;
  int64_t batch_stride, head_stride, row_stride;  // in floats
};

// Added to the scores, or caps them; the Lk floats of a row are contiguous, strides may be
// 0. Those of keys outside starts and lengths are not read.
struct Mask {
  const float* data;  // or null: scores stay as they are
  int64_t batch_stride, head_stride, row_stride;
  bool caps = false;  // the smaller of score and mask instead of their sum
};

struct Call {
  Rows q, k, v;
  float* out;              // [B, Lq, H, D]
  const int64_t* lengths;  // [B], each 0..Lk, or null: all of Lk
  int64_t batch, query_rows, key_rows, heads, head_dim;
  float scale;
  Mask mask{};
  const int64_t* starts = nullptr;  // [B], each 0..length, or null: 0
  float nothing = 0.0f;             // what a row gives that sees no key: 0 or NaN

  int64_t first_key(int64_t b) const { return starts ? starts[b] : 0; }
  int64_t end_key(int64_t b) const { return lengths ? lengths[b] : key_rows; }
};

// Query rows [begin, end) of one head of one batch.
struct Part {
  int64_t batch, head, begin, end;
};

// The mask of query row i from the first key on.
inline const float* mask_row(const Call& call, const Part& part, int64_t i) {
  return call.mask.data + part.batch * call.mask.batch_stride + part.head * call.mask.head_stride +
         i * call.mask.row_stride + call.first_key(part.batch);
}
// Whether all scores are -inf; false with a NaN among them.
inline bool sees_nothing(const float* scores, int64_t keys) {
  for (int64_t j = 0; j < keys; ++j)
    if (!(scores[j] < std::numeric_limits<float>::lowest())) return false;
  return true;
}

struct Kernel {
  Isa isa;
  // Floats of scratch one thread needs for this many valid keys.
  int64_t (*scratch_floats)(int64_t keys, int64_t head_dim);
  void (*part)(const Call& call, const Part& part, float* scratch);
  // Scores of one row, at least one, to weights in their place; 1 / the weights' sum. A row of -inf
  // alone, and one with a NaN, gives NaN.
  float (*softmax)(float* row, int64_t keys);
};

extern const Kernel kScalar;
extern const Kernel kAvx2;
extern const Kernel kAvx512;

const Kernel& select();
// The first batch whose length lies outside 0..Lk, or its start outside 0..length; or -1 and out is
// written.
int64_t run(const Call& call);

}  // namespace fastrec::padded_attention
