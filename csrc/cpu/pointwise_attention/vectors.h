// Forward and gradients over blocks of queries as lanes, for every vector instruction set. Included
// after vec16_<isa>.h and the ISA's register blocking:
//   kQueryVectors: registers of queries a block has;
//   kKeys: scores of that many keys at once, a multiple of 3;
//   kSumVectors: most registers of dims of a weighted sum; sum_rows_of_vectors(n): rows with n.
// and after gather(table, numbers) and find_buckets(...).
//
// Scores lie as [key][lane]: biases, SiLU and its slope work on whole registers. Per block and
// chunk of keys:
//   scores: lanes from [D][lanes], the keys' elements broadcast: no horizontal sums;
//   sums:   a weight broadcast times a row, over keys (out, dq) or over queries (dk, dv).
#pragma once

#include "pointwise_attention/pointwise_attention.h"
#include "vec16_math.h"
#include "vec16_rows.h"

namespace fastrec::pointwise_attention {
namespace {

constexpr int kBlock = kQueryVectors * kLanes;
// Keys at once: a multiple of kKeys, at least a block's rows; packed, they stay in the L1 cache.
constexpr int64_t kChunk = 60;
// Floats between packed rows: an odd number of cache lines, so that rows share no set.
constexpr int64_t kStride = kMaxDims + kLanes;
constexpr float kLog2E = 1.44269504088896341f;

int64_t width_of(int64_t dims) { return (dims + kLanes - 1) / kLanes * kLanes; }

// Rows as f32, times factor, zeros up to a whole number of registers.
template <class T>
FASTREC_VEC void pack(Rows<const T> rows, int64_t begin, int64_t count, int64_t dims, float factor,
                      float* to) {
  const Floats times = splat(factor);
  for (int64_t c = 0; c < dims; c += kLanes) {
    const Lanes lanes = first_lanes(dims - c);
    const T* from = rows[begin] + c;
    for (int64_t r = 0; r < count; ++r, from += rows.stride)
      store(to + r * kStride + c, multiply(times, load_row(from, lanes)));
  }
}

// A block's rows, [lane][kStride], and the same as columns, [D][lane].
template <class T>
FASTREC_VEC void pack_block(Rows<const T> from, int64_t begin, int64_t count, int64_t dims,
                            float factor, float* rows, float* columns) {
  pack(from, begin, count, dims, factor, rows);
  for (int64_t r = count; r < kBlock; ++r) std::fill_n(rows + r * kStride, width_of(dims), 0.0f);
  for (int64_t c = 0; c < dims; c += kLanes)
    for (int v = 0; v < kQueryVectors; ++v)
      transpose_tile(rows + v * kLanes * kStride + c, kStride, kLanes,
                     std::min<int64_t>(kLanes, dims - c), columns + c * kBlock + v * kLanes,
                     kBlock);
}

template <int keys>
FASTREC_VEC __attribute__((noinline)) void key_scores(const float* columns, const float* packed,
                                                      int64_t dims, float* out) {
  Floats acc[keys][kQueryVectors];
#pragma GCC unroll 12
  for (int k = 0; k < keys; ++k)
#pragma GCC unroll 2
    for (int v = 0; v < kQueryVectors; ++v) acc[k][v] = zeros();
  for (int64_t d = 0; d < dims; ++d) {
    Floats lanes[kQueryVectors];
#pragma GCC unroll 2
    for (int v = 0; v < kQueryVectors; ++v) lanes[v] = load(columns + d * kBlock + v * kLanes);
#pragma GCC unroll 12
    for (int k = 0; k < keys; ++k) {
      const Floats key = splat(packed[k * kStride + d]);
#pragma GCC unroll 2
      for (int v = 0; v < kQueryVectors; ++v) acc[k][v] = fma(key, lanes[v], acc[k][v]);
    }
  }
#pragma GCC unroll 12
  for (int k = 0; k < keys; ++k)
#pragma GCC unroll 2
    for (int v = 0; v < kQueryVectors; ++v) store(out + k * kBlock + v * kLanes, acc[k][v]);
}

// Scores of `count` keys, and of up to kKeys / 3 - 1 rows behind.
FASTREC_VEC void scores(const float* columns, const float* packed, int64_t count, int64_t dims,
                        float* out) {
  constexpr int kFew = kKeys / 3;
  int64_t n = 0;
  for (; n + kKeys <= count; n += kKeys)
    key_scores<kKeys>(columns, packed + n * kStride, dims, out + n * kBlock);
  for (; n < count; n += kFew)
    key_scores<kFew>(columns, packed + n * kStride, dims, out + n * kBlock);
}

// out[r] += sum over n of a weight times others[n], `rows` rows r, `vectors` registers of dims.
// The weight of r and n: weights[n][r], or, across, weights[r][n].
template <int rows, int vectors, bool across>
FASTREC_VEC __attribute__((noinline)) void weighted_sum(const float* weights, int64_t count,
                                                        const float* others, float* out,
                                                        int64_t out_stride) {
  Floats acc[rows][vectors];
#pragma GCC unroll 8
  for (int r = 0; r < rows; ++r)
#pragma GCC unroll 4
    for (int c = 0; c < vectors; ++c) acc[r][c] = load(out + r * out_stride + c * kLanes);
  for (int64_t n = 0; n < count; ++n, others += kStride, weights += across ? 1 : kBlock) {
    Floats other[vectors];
#pragma GCC unroll 4
    for (int c = 0; c < vectors; ++c) other[c] = load(others + c * kLanes);
#pragma GCC unroll 8
    for (int r = 0; r < rows; ++r) {
      const Floats weight = splat(weights[across ? r * kBlock : r]);
#pragma GCC unroll 4
      for (int c = 0; c < vectors; ++c) acc[r][c] = fma(weight, other[c], acc[r][c]);
    }
  }
#pragma GCC unroll 8
  for (int r = 0; r < rows; ++r)
#pragma GCC unroll 4
    for (int c = 0; c < vectors; ++c) store(out + r * out_stride + c * kLanes, acc[r][c]);
}

template <int vectors, bool across>
FASTREC_VEC void sum_columns(const float* weights, int64_t rows, int64_t count, const float* others,
                             float* out, int64_t out_stride) {
  constexpr int kRows = sum_rows_of_vectors(vectors);
  constexpr int64_t kStep = across ? kBlock : 1;
  int64_t r = 0;
  for (; r + kRows <= rows; r += kRows)
    weighted_sum<kRows, vectors, across>(weights + r * kStep, count, others, out + r * out_stride,
                                         out_stride);
  static_assert(across || kBlock % kRows == 0);
  if constexpr (across)
    for (; r < rows; ++r)
      weighted_sum<1, vectors, across>(weights + r * kStep, count, others, out + r * out_stride,
                                       out_stride);
}

// weighted_sum over any number of rows and dims.
template <bool across>
FASTREC_VEC void sums(const float* weights, int64_t rows, int64_t count, const float* others,
                      int64_t dims, float* out, int64_t out_stride) {
  int64_t c = 0;
  const int64_t width = width_of(dims);
  for (; c + kSumVectors * kLanes <= width; c += kSumVectors * kLanes)
    sum_columns<kSumVectors, across>(weights, rows, count, others + c, out + c, out_stride);
  if constexpr (kSumVectors > 2)
    for (; c + 2 * kLanes <= width; c += 2 * kLanes)
      sum_columns<2, across>(weights, rows, count, others + c, out + c, out_stride);
  if constexpr (kSumVectors > 1)
    for (; c < width; c += kLanes)
      sum_columns<1, across>(weights, rows, count, others + c, out + c, out_stride);
}

// 1 / (1 + e^-x): below -87 not the last of what underflows, but less than 2^-125. A NaN stays one.
FASTREC_VEC_INLINE Floats sigmoid(Floats x) {
  const Floats power = minimum(splat(126.0f), multiply(x, splat(-kLog2E)));
  return reciprocal(add(splat(1.0f), exp2(power)));
}

// Keys that a block of queries meets together.
struct Chunk {
  int64_t begin, count;
};

// Calls body(chunk) for what the rows [i0, i0 + rows) see: history, then each target itself.
template <class F>
FASTREC_VEC_INLINE void for_each_chunk(bool causal, const Sequence& sequence, int64_t i0,
                                       int64_t rows, F&& body) {
  const int64_t end = causal ? std::min(sequence.history, i0 + rows) : sequence.history;
  for (int64_t j = 0; j < end; j += kChunk) body(Chunk{j, std::min(kChunk, end - j)});
  const int64_t self = std::max(sequence.history, i0);
  if (self < i0 + rows) body(Chunk{self, i0 + rows - self});
}

// One head's block of queries, apart from its numbers.
struct Pairs {
  int64_t i0, history;
  bool causal;
  const float *position, *time;  // the head's tables, or null

  // Lanes that see key j.
  std::pair<int64_t, int64_t> lanes_of(int64_t j) const {
    if (j >= history) return {j - i0, j - i0 + 1};
    return {causal ? std::max<int64_t>(0, j - i0) : 0, kBlock};
  }
};

FASTREC_VEC_INLINE Floats within(std::pair<int64_t, int64_t> range, int64_t from, Floats x) {
  if (range.first > from) x = blend(first_lanes(range.first - from), zeros(), x);
  if (range.second < from + kLanes) x = blend(first_lanes(range.second - from), x, zeros());
  return x;
}

FASTREC_VEC_INLINE Floats biased(const Pairs& pairs, const Chunk& chunk, int64_t n, int lane,
                                 const int32_t* buckets, const float* scores) {
  Floats x = load(scores + n * kBlock + lane);
  if (pairs.position) x = add(x, load(pairs.position + pairs.i0 - chunk.begin - n + lane));
  if (pairs.time) x = add(x, gather(pairs.time, buckets + n * kBlock + lane));
  return x;
}

// Scores become weights.
FASTREC_VEC __attribute__((noinline)) void activate(const Pairs& pairs, const Chunk& chunk,
                                                    const int32_t* buckets, float* scores) {
  for (int64_t n = 0; n < chunk.count; ++n) {
    const auto range = pairs.lanes_of(chunk.begin + n);
#pragma GCC unroll 2
    for (int lane = 0; lane < kBlock; lane += kLanes) {
      const Floats x = biased(pairs, chunk, n, lane, buckets, scores);
      store(scores + n * kBlock + lane, within(range, lane, multiply(x, sigmoid(x))));
    }
  }
}

// Scores become weights, and the gradients of weights those of biased scores.
FASTREC_VEC __attribute__((noinline)) void activate_and_derive(const Pairs& pairs,
                                                               const Chunk& chunk,
                                                               const int32_t* buckets,
                                                               float* scores, float* grads) {
  for (int64_t n = 0; n < chunk.count; ++n) {
    const auto range = pairs.lanes_of(chunk.begin + n);
#pragma GCC unroll 2
    for (int lane = 0; lane < kBlock; lane += kLanes) {
      const Floats x = biased(pairs, chunk, n, lane, buckets, scores);
      const Floats s = sigmoid(x), weight = multiply(x, s);
      // s + x s (1 - s)
      const Floats slope = add(fnma(weight, s, weight), s);
      float* const grad = grads + n * kBlock + lane;
      store(grad, within(range, lane, multiply(slope, load(grad))));
      store(scores + n * kBlock + lane, within(range, lane, weight));
    }
  }
}

template <class T>
FASTREC_VEC void write_rows(const float* sums, int64_t stride, int64_t count, int64_t dims,
                            float factor, Rows<T> to, int64_t begin) {
  const Floats times = splat(factor);
  for (int64_t r = 0; r < count; ++r)
    for (int64_t c = 0; c < dims; c += kLanes)
      store_row(to[begin + r] + c, multiply(times, load(sums + r * stride + c)),
                first_lanes(dims - c));
}

// Hands out parts of one thread's scratch, in whole cache lines.
struct Memory {
  float* next;
  template <class T = float>
  T* take(int64_t count) {
    auto* const from = static_cast<T*>(static_cast<void*>(next));
    next += width_of(count * static_cast<int64_t>(sizeof(T) / sizeof(float)));
    return from;
  }
};

// Packed rows; scores of up to kKeys rows behind the chunk are computed and not used.
constexpr int64_t kPackedFloats = (kChunk + kKeys) * kStride;
constexpr int64_t kScoreFloats = (kChunk + kKeys) * kBlock;

int64_t forward_floats(const Call& call) {
  const int64_t heads = call.shape.heads, width = width_of(call.shape.value_dims);
  return heads * kBlock * (width_of(call.shape.dims) + width) + kBlock * kStride + kPackedFloats +
         2 * kScoreFloats + 2 * kBlock;
}

template <class T>
FASTREC_VEC void forward(const Call& call, const Tables& tables, const Part& part, float* scratch) {
  const int64_t dims = call.shape.dims, value_dims = call.shape.value_dims;
  const int64_t heads = call.shape.heads, width = width_of(value_dims);
  const int64_t column_floats = width_of(dims) * kBlock;
  const Sequence& sequence = part.sequence;
  Memory memory{scratch};
  float *const
      columns = memory.take(heads * column_floats),
      *const rows = memory.take(kBlock * kStride), *const sum = memory.take(heads * kBlock * width),
      *const packed = memory.take(kPackedFloats), *const weights = memory.take(kScoreFloats);
  auto* const buckets = memory.take<int32_t>(kScoreFloats);
  auto* const query_times = memory.take<int64_t>(kBlock);
  const int64_t at = times_at(call.shape, sequence);
  for (int64_t i0 = part.begin; i0 < part.end; i0 += kBlock) {
    const int64_t count = std::min<int64_t>(kBlock, part.end - i0);
    for (int64_t h = 0; h < heads; ++h)
      pack_block(rows_of<const T>(call.q, sequence, h), i0, count, dims, call.scale, rows,
                 columns + h * column_floats);
    std::fill_n(sum, heads * kBlock * width, 0.0f);
    if (call.bias.time)
      for (int64_t r = 0; r < kBlock; ++r)
        query_times[r] = call.bias.query_times[at + i0 + std::min(r, count - 1)];
    for_each_chunk(call.causal, sequence, i0, count, [&](const Chunk& chunk) FASTREC_VEC {
      if (call.bias.time)
        find_buckets(tables.buckets, query_times, call.bias.times + at + chunk.begin, chunk.count,
                     buckets);
      for (int64_t h = 0; h < heads; ++h) {
        const Pairs pairs{i0, sequence.history, call.causal, tables.position_of(h),
                          tables.time_of(h)};
        pack(rows_of<const T>(call.k, sequence, h), chunk.begin, chunk.count, dims, 1.0f, packed);
        scores(columns + h * column_floats, packed, chunk.count, dims, weights);
        activate(pairs, chunk, buckets, weights);
        pack(rows_of<const T>(call.v, sequence, h), chunk.begin, chunk.count, value_dims, 1.0f,
             packed);
        sums<false>(weights, kBlock, chunk.count, packed, value_dims, sum + h * kBlock * width,
                    width);
      }
    });
    for (int64_t h = 0; h < heads; ++h)
      write_rows(sum + h * kBlock * width, width, count, value_dims, call.inverse_norm,
                 rows_of<T>(call.out, sequence, h), i0);
  }
}

int64_t backward_floats(const Call& call, int64_t rows) {
  const int64_t width = width_of(call.shape.dims), value_width = width_of(call.shape.value_dims);
  return 2 * kBlock * kStride + kBlock * (2 * width + value_width) + rows * (width + value_width) +
         2 * kPackedFloats + 3 * kScoreFloats + 2 * kBlock + width_of(2 * (rows + kBlock)) +
         call.bias.buckets * kLanes;
}

// Adds gradients of scores to those of the position table by i - j. Sixteen keys apart, because
// neighbouring keys' sums overlap by all but one number.
FASTREC_VEC __attribute__((noinline)) void add_positions(const Pairs& pairs, const Chunk& chunk,
                                                         const float* grads, float* to) {
  for (int64_t first = 0; first < std::min<int64_t>(kLanes, chunk.count); ++first)
    for (int64_t n = first; n < chunk.count; n += kLanes)
#pragma GCC unroll 2
      for (int lane = 0; lane < kBlock; lane += kLanes) {
        float* const at = to + pairs.i0 - chunk.begin - n + lane;
        store(at, add(load(at), load(grads + n * kBlock + lane)));
      }
}

// The same by bucket, each lane in a column of its own: [bucket][16].
FASTREC_VEC __attribute__((noinline)) void add_times(const int32_t* buckets, int64_t count,
                                                     const float* grads, float* to) {
  for (int64_t n = 0; n < count * kBlock; n += kLanes)
#pragma GCC unroll 16
    for (int lane = 0; lane < kLanes; ++lane)
      to[int64_t{buckets[n + lane]} * kLanes + lane] += grads[n + lane];
}

template <class T>
FASTREC_VEC void backward(const Call& call, const Gradients& to, const Tables& tables,
                          const Sequence& sequence, int64_t h, const TableGradients& own,
                          float* scratch) {
  const int64_t dims = call.shape.dims, value_dims = call.shape.value_dims, n_rows = sequence.rows;
  const int64_t width = width_of(dims), value_width = width_of(value_dims);
  const auto q = rows_of<const T>(call.q, sequence, h), k = rows_of<const T>(call.k, sequence, h),
             v = rows_of<const T>(call.v, sequence, h),
             d_out = rows_of<const T>(to.d_out, sequence, h);
  Memory memory{scratch};
  float *const rows = memory.take(kBlock * kStride), *const d_rows = memory.take(kBlock * kStride);
  float *const columns = memory.take(width * kBlock), *const d_columns =
                                                          memory.take(value_width * kBlock);
  float *const sum_q = memory.take(kBlock * width), *const sum_k = memory.take(n_rows * width),
               *const sum_v = memory.take(n_rows * value_width);
  float *const keys = memory.take(kPackedFloats), *const values = memory.take(kPackedFloats);
  float *const weights = memory.take(kScoreFloats), *const grads = memory.take(kScoreFloats);
  auto* const buckets = memory.take<int32_t>(kScoreFloats);
  auto* const query_times = memory.take<int64_t>(kBlock);
  float* const positions = memory.take(2 * (n_rows + kBlock)) + n_rows;
  float* const times = memory.take(call.bias.buckets * kLanes);
  std::fill_n(sum_k, n_rows * width, 0.0f);
  std::fill_n(sum_v, n_rows * value_width, 0.0f);
  std::fill_n(positions - n_rows, 2 * (n_rows + kBlock), 0.0f);
  std::fill_n(times, call.bias.buckets * kLanes, 0.0f);
  const int64_t at = times_at(call.shape, sequence);
  const float factor = call.scale * call.inverse_norm;
  for (int64_t i0 = 0; i0 < n_rows; i0 += kBlock) {
    const int64_t count = std::min<int64_t>(kBlock, n_rows - i0);
    const Pairs pairs{i0, sequence.history, call.causal, tables.position_of(h), tables.time_of(h)};
    pack_block(q, i0, count, dims, 1.0f, rows, columns);
    pack_block(d_out, i0, count, value_dims, 1.0f, d_rows, d_columns);
    std::fill_n(sum_q, kBlock * width, 0.0f);
    if (pairs.time)
      for (int64_t r = 0; r < kBlock; ++r)
        query_times[r] = call.bias.query_times[at + i0 + std::min(r, count - 1)];
    for_each_chunk(call.causal, sequence, i0, count, [&](const Chunk& chunk) FASTREC_VEC {
      if (pairs.time)
        find_buckets(tables.buckets, query_times, call.bias.times + at + chunk.begin, chunk.count,
                     buckets);
      pack(k, chunk.begin, chunk.count, dims, call.scale, keys);
      pack(v, chunk.begin, chunk.count, value_dims, 1.0f, values);
      scores(columns, keys, chunk.count, dims, weights);
      scores(d_columns, values, chunk.count, value_dims, grads);
      activate_and_derive(pairs, chunk, buckets, weights, grads);
      if (own.position) add_positions(pairs, chunk, grads, positions);
      if (own.time) add_times(buckets, chunk.count, grads, times);
      sums<false>(grads, kBlock, chunk.count, keys, dims, sum_q, width);
      sums<true>(grads, chunk.count, count, rows, dims, sum_k + chunk.begin * width, width);
      sums<true>(weights, chunk.count, count, d_rows, value_dims, sum_v + chunk.begin * value_width,
                 value_width);
    });
    // The keys were scaled already.
    write_rows(sum_q, width, count, dims, call.inverse_norm, rows_of<T>(to.dq, sequence, h), i0);
  }
  write_rows(sum_k, width, n_rows, dims, factor, rows_of<T>(to.dk, sequence, h), 0);
  write_rows(sum_v, value_width, n_rows, value_dims, call.inverse_norm,
             rows_of<T>(to.dv, sequence, h), 0);
  const int64_t last = call.bias.positions - 1;
  if (own.position)
    for (int64_t n = 1 - n_rows; n < n_rows; ++n)
      own.position[last + std::clamp(-n, -last, last)] += positions[n];
  if (own.time)
    for (int64_t b = 0; b < call.bias.buckets; ++b)
      own.time[b] = sum_lanes(load(times + b * kLanes));
}

void forward_any(const Call& call, const Tables& tables, const Part& part, float* scratch) {
  with_dtype(call.shape.dtype, [&](auto t) { forward<decltype(t)>(call, tables, part, scratch); });
}

void backward_any(const Call& call, const Gradients& to, const Tables& tables,
                  const Sequence& sequence, int64_t head, const TableGradients& own,
                  float* scratch) {
  with_dtype(call.shape.dtype, [&](auto t) {
    backward<decltype(t)>(call, to, tables, sequence, head, own, scratch);
  });
}

}  // namespace
}  // namespace fastrec::pointwise_attention
