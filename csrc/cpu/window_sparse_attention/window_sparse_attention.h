// window_sparse_attention: out[i] = sum_j softmax_j(scale * q[i] . k[j]) v[j] over the keys j that
// row i sees: j < keys, not causal or j <= i, and |i - j| <= window or |i - j| in distances.
//
// q, k, v, out: f32, bf16 or f16, one dtype for all; rows of one head are D contiguous elements,
// batches, heads and rows have strides of their own, so that views into a merged projection need
// no copy. Sequences lie in batches of L rows, or behind each other with their starts in
// cu_seqlens. Scores, softmax (the row's maximum subtracted first) and sums are fp32. lse[i] = log
// sum_j exp(score) in natural units; a row that sees no key gives zeros and lse -inf. Keys beyond
// the length are never read, whatever they hold; kernels read nothing outside the given rows. Rows
// beyond the length are queries like any other. The gradients are gathered, never scattered: dq by
// rows of queries, dk and dv by rows of keys, each recomputing its scores from lse, so they do not
// depend on the number of threads. Scratch is O(L) a thread (the scores of one block of rows),
// never L x L.
#pragma once

#include <cstdint>
#include <span>
#include <vector>

#include "isa.h"

namespace fastrec::window_sparse_attention {

constexpr int64_t kMaxDims = 256;

enum class Dtype : int { f32, bf16, f16 };

// Rows of D contiguous elements; strides in elements.
struct View {
  void* data;
  int64_t batch_stride, head_stride, row_stride;
};

// Who sees whom. Distances are rising, all above the window.
struct Pattern {
  int64_t window;
  bool causal;
  std::vector<std::vector<int64_t>> distances;  // one list, or one a head

  std::span<const int64_t> of_head(int64_t head) const {
    return distances[distances.size() == 1 ? 0 : static_cast<size_t>(head)];
  }
};

struct Shape {
  Dtype dtype;
  int64_t batch, heads, rows, dims;  // rows: L, or T where cu_seqlens is given
  const int64_t* lengths;            // [B], each 0..L, or null: all of L
  const int64_t* cu_seqlens;         // [B + 1], rising from 0 to T, or null
};

// lse, its gradient and delta are f32 with one element a row.
struct Forward {
  Shape shape;
  const Pattern* pattern;
  float scale;
  View q, k, v, out;
  View lse;  // data null: not wanted
};

struct Backward {
  Shape shape;
  const Pattern* pattern;
  float scale;
  View q, k, v, out, lse;
  View d_out, d_lse;  // d_lse.data null: zero
  View dq, dk, dv;
  View delta;  // scratch: d_out . out - d_lse
};

// Rows [begin, end) of one head of one sequence; the kernels add `first` to row numbers.
struct Part {
  int64_t batch, head, first;
  int64_t rows, keys;  // of the sequence; keys: those that may be seen
  int64_t begin, end;
};

template <class T>
struct Rows {
  T* data;
  int64_t stride;
  T* operator[](int64_t i) const { return data + i * stride; }
};

template <class T>
Rows<T> rows_of(const View& view, const Part& part) {
  T* data = static_cast<T*>(view.data);
  if (data)
    data += part.batch * view.batch_stride + part.head * view.head_stride +
            part.first * view.row_stride;
  return {data, view.row_stride};
}

struct Kernel {
  Isa isa;
  // Floats of scratch one thread needs where a sequence has at most this many rows.
  int64_t (*scratch_floats)(const Pattern& pattern, int64_t rows, int64_t dims);
  void (*forward)(const Forward& call, const Part& part, float* scratch);
  void (*delta)(const Backward& call, const Part& part);
  void (*grad_q)(const Backward& call, const Part& part, float* scratch);   // part: queries
  void (*grad_kv)(const Backward& call, const Part& part, float* scratch);  // part: keys
};

extern const Kernel kScalar;
extern const Kernel kAvx2;
extern const Kernel kAvx512;

const Kernel& select();

// -1 and the result is written, or the first entry of lengths or cu_seqlens that is out of order.
int64_t forward(const Forward& call);
int64_t backward(const Backward& call);

}  // namespace fastrec::window_sparse_attention
