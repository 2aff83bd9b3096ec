// pointwise_attention: out[i] = sum_j silu(scale * q[i] . k[j] + bias(i, j)) / norm * v[j]
//
// The sum runs over the keys j that row i sees. The last targets[b] rows of a sequence are targets,
// the rows before them its history: row i sees j where j == i, or where j is history and (not
// causal or j < i). So a target is seen by itself alone.
//
//   bias(i, j) = position[positions - 1 + clamp(j - i, 1 - positions, positions - 1)]
//              + time[number of edges <= |query_times[i] - times[j]|]
//
// q, k f32, bf16 or f16 [rows, D], v and out [rows, Dv], one dtype for all; rows of a head are
// contiguous, batches, heads and rows have strides of their own (in elements). Sequences lie in
// batches of L rows, of which the first lengths[b] are the sequence and the others give zeros and
// are never read; or behind each other, with their starts in cu_seqlens. Tables are f32, one for
// all heads or one a head. All sums are fp32. Kernels read nothing outside the given rows.
//
// Gradients: dq, dk, dv like q, k, v; d_position [H, 2 positions - 1] and d_time [H, buckets] f32,
// summed over the batch. One thread works through one head of a sequence in order, and the tables'
// gradients of the sequences are added in order: results do not depend on the number of threads.
// Scratch is O(L (D + Dv)) floats a thread, never L x L.
#pragma once

#include <algorithm>
#include <cstdint>
#include <utility>
#include <vector>

#include "float16.h"
#include "isa.h"

namespace fastrec::pointwise_attention {

constexpr int64_t kMaxDims = 256, kMaxBuckets = 4096;
// Rows of a part of the forward: a block of the widest kernel.
constexpr int64_t kPartRows = 32;
// Differences of times count as at most this, which a double still holds exactly.
constexpr uint64_t kMaxTime = uint64_t{1} << 53;

enum class Dtype : int { f32, bf16, f16 };

// Rows of contiguous elements; strides in elements.
struct View {
  void* data;
  int64_t batch_stride, head_stride, row_stride;
};

struct Shape {
  Dtype dtype;
  int64_t batch, heads, rows, dims, value_dims;  // rows: L, or T where cu_seqlens is given
  const int64_t* lengths;                        // [B], each 0..L, or null: all of L
  const int64_t* cu_seqlens;                     // [B + 1], rising from 0 to T, or null
  const int64_t* targets;                        // [B], each 0..its sequence's rows, or null: 0
};

// Heads' tables lie `stride` floats apart, 0: one for all.
struct Bias {
  const float* position;  // 2 positions - 1 numbers, or null
  int64_t position_stride, positions;
  const float* time;  // `buckets` numbers, or null
  int64_t time_stride, buckets;
  const int64_t* edges;                // buckets - 1, none falling, each 1..kMaxTime
  const int64_t *times, *query_times;  // one a row, like a head of q without gaps
};

struct Call {
  Shape shape;
  Bias bias;
  float scale, inverse_norm;
  bool causal;
  View q, k, v, out;
};

struct Gradients {
  View d_out, dq, dk, dv;
  float *d_position, *d_time;  // null where there is no such table
};

// Bucket of a difference of times: start at first[its cell] and step over edges, at most `steps`.
// A cell is what shares a double's exponent and its first four digits.
struct Buckets {
  static constexpr int kShift = 48, kBase = (1023 << 4) - 1;
  std::vector<int32_t> first;
  std::vector<int64_t> edges;  // and one that nothing reaches
  int steps = 0;
};

// Tables as the kernels read them, made once a call.
struct Tables {
  // Position biases by i - j, those of head h from h * position_stride on; the one of 0 lies at
  // `origin`. Enough for any two rows of one sequence, and for the lanes behind them.
  std::vector<float> position;
  int64_t position_stride = 0, origin = 0;
  // Time biases by bucket, zeros behind them up to a multiple of kTimeEntries.
  static constexpr int64_t kTimeEntries = 128;
  std::vector<float> time;
  int64_t time_stride = 0;
  Buckets buckets;

  const float* position_of(int64_t head) const {
    return position.empty() ? nullptr : position.data() + head * position_stride + origin;
  }
  const float* time_of(int64_t head) const {
    return time.empty() ? nullptr : time.data() + head * time_stride;
  }
};

struct Sequence {
  int64_t batch, first, rows, history;  // kernels add `first` to row numbers
};

// Rows [begin, end) of one sequence, all heads.
struct Part {
  Sequence sequence;
  int64_t begin, end;
};

// Where one head of one sequence leaves the gradients of its tables.
struct TableGradients {
  float *position, *time;  // null where there is no such table
};

template <class T>
struct Rows {
  T* data;
  int64_t stride;
  T* operator[](int64_t i) const { return data + i * stride; }
};

template <class T>
Rows<T> rows_of(const View& view, const Sequence& sequence, int64_t head) {
  return {static_cast<T*>(view.data) + sequence.batch * view.batch_stride +
              head * view.head_stride + sequence.first * view.row_stride,
          view.row_stride};
}

// Where the times of a sequence begin.
inline int64_t times_at(const Shape& shape, const Sequence& sequence) {
  return sequence.batch * shape.rows + sequence.first;
}

inline bool sees(bool causal, int64_t history, int64_t i, int64_t j) {
  return j == i || (j < history && (!causal || j < i));
}

// |a - b| and its bucket.
inline uint64_t apart(int64_t a, int64_t b) {
  const uint64_t x = static_cast<uint64_t>(std::max(a, b)) - static_cast<uint64_t>(std::min(a, b));
  return std::min(x, kMaxTime);
}
int32_t bucket_of(const Buckets& buckets, uint64_t difference);

// f(element) with an element of the dtype that is named.
template <class F>
void with_dtype(Dtype dtype, F&& f) {
  switch (dtype) {
    case Dtype::f32:
      return f(float{});
    case Dtype::bf16:
      return f(Bf16{});
    case Dtype::f16:
      return f(F16{});
  }
}

struct Kernel {
  Isa isa;
  // Floats of scratch one thread needs where a sequence has at most this many rows.
  int64_t (*forward_floats)(const Call& call);
  int64_t (*backward_floats)(const Call& call, int64_t rows);
  void (*forward)(const Call& call, const Tables& tables, const Part& part, float* scratch);
  void (*backward)(const Call& call, const Gradients& to, const Tables& tables,
                   const Sequence& sequence, int64_t head, const TableGradients& own,
                   float* scratch);
};

extern const Kernel kScalar;
extern const Kernel kAvx2;
extern const Kernel kAvx512;

const Kernel& select();

// The reason that stopped a call, and at which entry.
enum class Bad : int { nothing, lengths, cu_seqlens, targets, edges };
using Result = std::pair<Bad, int64_t>;

// The sequences, or the first entry that is out of order.
Result sequences_of(const Shape& shape, const Bias& bias, std::vector<Sequence>* to);
Tables make_tables(const Shape& shape, const Bias& bias, int64_t longest);
// Zeros in a padded batch's rows that belong to no sequence.
void clear_rows(const Shape& shape, const View& view, int64_t dims, int64_t element_bytes,
                const Sequence& sequence);

Result forward(const Call& call);
Result backward(const Call& call, const Gradients& to);

}  // namespace fastrec::pointwise_attention
