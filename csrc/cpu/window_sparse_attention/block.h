// One block of 16 rows against what it sees, for the vector kernels: which others, their scores,
// and sums weighted by what became of the scores. Included by vectors.h, after vec16_<isa>.h.
//
// Scores lie as [pair][16 rows]: a pair is one other row of the window, which all lanes meet, or
// one far distance, at which lane r meets row first + r. Softmax and gradients then work on whole
// registers and never across lanes.
//   window: lanes from [D][16], the other row's elements broadcast: no horizontal sums.
//   far:    16 dot products of natural rows, summed across by one tree of shuffles.
//   sums:   a weight broadcast times a natural row, kSumRows rows in registers.
#pragma once

#include <algorithm>

#include "vec16_rows.h"
#include "window_sparse_attention/window_sparse_attention.h"

namespace fastrec::window_sparse_attention {
namespace {

// Floats between rows in scratch: an odd number of cache lines, so that rows share no set.
constexpr int64_t kStride = kMaxDims + kLanes;

// Lane r in [first, last) meets the other row `row` + r.
struct Far {
  int64_t row;
  int32_t first, last;
};

struct Block {
  int64_t begin, count;       // the rows that are lanes
  int64_t low, high;          // a lane meets others from low before it to high after it
  int64_t near_begin, nears;  // the others that some lane meets in the window
  const Far* far;
  int64_t fars;

  int64_t pairs() const { return nears + fars; }
};

struct LaneRange {
  int64_t first, last;
  bool partial() const { return first > 0 || last < kLanes; }
};

// Lanes that meet near row n.
inline LaneRange lanes_of(const Block& block, int64_t n) {
  const int64_t at = block.near_begin + n - block.begin;
  return {std::max<int64_t>(0, at - block.high), std::min(block.count, at + block.low + 1)};
}

FASTREC_VEC_INLINE Floats within(LaneRange range, Floats inside, Floats outside) {
  if (range.first > 0) inside = blend(first_lanes(range.first), outside, inside);
  if (range.last < kLanes) inside = blend(first_lanes(range.last), inside, outside);
  return inside;
}

inline Block make_block(const Pattern& pattern, const Part& part, int64_t begin, int64_t others,
                        bool before, bool after, Far* far) {
  Block block;
  block.begin = begin;
  block.count = std::min<int64_t>(kLanes, part.end - begin);
  block.low = before ? pattern.window : 0;
  block.high = after ? pattern.window : 0;
  block.near_begin = std::max<int64_t>(0, begin - block.low);
  const int64_t end = std::min(others, begin + block.count + block.high);
  block.nears = std::max<int64_t>(0, end - block.near_begin);
  block.far = far;
  const auto add = [&](int64_t row) {
    const int64_t first = std::max<int64_t>(0, -row), last = std::min(block.count, others - row);
    if (first < last) *far++ = {row, static_cast<int32_t>(first), static_cast<int32_t>(last)};
  };
  for (const int64_t distance : pattern.of_head(part.head)) {
    if (distance >= part.rows) break;
    if (before) add(begin - distance);
    if (after) add(begin + distance);
  }
  block.fars = far - block.far;
  return block;
}

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

// A block's rows in both forms in which the scores want them.
struct LaneRows {
  float* rows;     // [16][kStride]
  float* columns;  // [D][16]
};

template <class T>
FASTREC_VEC void pack_lanes(Rows<const T> rows, const Block& block, int64_t dims, float factor,
                            const LaneRows& to) {
  pack(rows, block.begin, block.count, dims, factor, to.rows);
  for (int64_t r = block.count; r < kLanes; ++r)
    std::fill_n(to.rows + r * kStride, (dims + kLanes - 1) / kLanes * kLanes, 0.0f);
  for (int64_t c = 0; c < dims; c += kLanes)
    transpose_tile(to.rows + c, kStride, kLanes, std::min<int64_t>(kLanes, dims - c),
                   to.columns + c * kLanes, kLanes);
}

template <int keys>
FASTREC_VEC __attribute__((noinline)) void near_scores(const float* columns, const float* packed,
                                                       int64_t dims, float* out) {
  Floats acc[keys];
#pragma GCC unroll 24
  for (int k = 0; k < keys; ++k) acc[k] = zeros();
  for (int64_t d = 0; d < dims; ++d) {
    const Floats lanes = load(columns + d * kLanes);
#pragma GCC unroll 24
    for (int k = 0; k < keys; ++k) acc[k] = fma(splat(packed[k * kStride + d]), lanes, acc[k]);
  }
#pragma GCC unroll 24
  for (int k = 0; k < keys; ++k) store(out + k * kLanes, acc[k]);
}

// vectors: registers a row has, all full; 0: any number, the last perhaps not full.
template <int vectors, class T>
FASTREC_VEC __attribute__((noinline)) void far_scores(const float* lanes, Rows<const T> others,
                                                      const Far& far, int64_t dims, float* out) {
  const bool all_meet = far.first == 0 && far.last == kLanes;
  const auto products = [&](int r) FASTREC_VEC __attribute__((always_inline)) {
    Floats sum = zeros();
    if (all_meet || (r >= far.first && r < far.last)) {
      const T* other = others[far.row + r];
      const float* own = lanes + r * kStride;
      if constexpr (vectors > 0) {
        sum = multiply(load(own), load_row(other));
#pragma GCC unroll 4
        for (int c = 1; c < vectors; ++c)
          sum = fma(load(own + c * kLanes), load_row(other + c * kLanes), sum);
      } else {
        int64_t c = 0;
        for (; c + kLanes <= dims; c += kLanes) sum = fma(load(own + c), load_row(other + c), sum);
        if (c < dims) sum = fma(load(own + c), load_row(other + c, first_lanes(dims - c)), sum);
      }
    }
    return sum;
  };
  store(out, sum_rows_of(products));
}

// Scores of all pairs of the block, [pairs][16]; lanes that do not meet hold anything finite inputs
// give. Up to kNearKeys - 1 rows behind are written too.
template <class T>
FASTREC_VEC void scores(const LaneRows& lanes, Rows<const T> others, const Block& block,
                        int64_t dims, float* packed, float* out) {
  constexpr int kStep = kNearKeys / 3;
  for (int64_t n = 0; n < block.nears; n += kNearKeys) {
    const int64_t count = std::min<int64_t>(kNearKeys, block.nears - n);
    pack(others, block.near_begin + n, count, dims, 1.0f, packed);
    float* const to = out + n * kLanes;
    if (count > 2 * kStep)
      near_scores<3 * kStep>(lanes.columns, packed, dims, to);
    else if (count > kStep)
      near_scores<2 * kStep>(lanes.columns, packed, dims, to);
    else
      near_scores<kStep>(lanes.columns, packed, dims, to);
  }
  float* to = out + block.nears * kLanes;
  for (int64_t f = 0; f < block.fars; ++f, to += kLanes) {
    const Far& far = block.far[f];
    if (dims == kLanes)
      far_scores<1>(lanes.rows, others, far, dims, to);
    else if (dims == 2 * kLanes)
      far_scores<2>(lanes.rows, others, far, dims, to);
    else if (dims == 4 * kLanes)
      far_scores<4>(lanes.rows, others, far, dims, to);
    else
      far_scores<0>(lanes.rows, others, far, dims, to);
  }
}

// sums[r] = sum over pairs of weights[pair][r0 + r] * others[its row], kSumRows rows r and
// `vectors` registers of dims; the last of them masked unless full.
template <int vectors, bool full, class T>
FASTREC_VEC __attribute__((noinline)) void weighted_sum(const float* weights, Rows<const T> others,
                                                        const Block& block, int64_t r0, int64_t c,
                                                        int64_t dims, float* sums) {
  const auto load_vector = [&](const T* from, int i) FASTREC_VEC {
    if constexpr (full)
      return load_row(from + i * kLanes);
    else
      return load_row(from + i * kLanes, first_lanes(dims - c - i * kLanes));
  };
  Floats acc[kSumRows][vectors];
#pragma GCC unroll 8
  for (int r = 0; r < kSumRows; ++r)
#pragma GCC unroll 2
    for (int i = 0; i < vectors; ++i) acc[r][i] = zeros();

  const int64_t shift = block.begin - block.near_begin;
  const int64_t first = std::max<int64_t>(0, shift + r0 - block.low);
  const int64_t last = std::min(block.nears, shift + r0 + kSumRows + block.high);
  const T* other = others[block.near_begin + first] + c;
  const float* weight = weights + first * kLanes + r0;
  for (int64_t n = first; n < last; ++n, other += others.stride, weight += kLanes) {
    Floats row[vectors];
#pragma GCC unroll 2
    for (int i = 0; i < vectors; ++i) row[i] = load_vector(other, i);
#pragma GCC unroll 8
    for (int r = 0; r < kSumRows; ++r) {
      const Floats times = splat(weight[r]);
#pragma GCC unroll 2
      for (int i = 0; i < vectors; ++i) acc[r][i] = fma(times, row[i], acc[r][i]);
    }
  }
  weight = weights + block.nears * kLanes + r0;
  for (int64_t f = 0; f < block.fars; ++f, weight += kLanes) {
    const Far& far = block.far[f];
    const bool all_meet = far.first <= r0 && far.last >= r0 + kSumRows;
    int64_t at = (far.row + r0) * others.stride + c;
#pragma GCC unroll 8
    for (int r = 0; r < kSumRows; ++r, at += others.stride)
      if (all_meet || (r0 + r >= far.first && r0 + r < far.last)) {
        const Floats times = splat(weight[r]);
#pragma GCC unroll 2
        for (int i = 0; i < vectors; ++i)
          acc[r][i] = fma(times, load_vector(others.data + at, i), acc[r][i]);
      }
  }
#pragma GCC unroll 8
  for (int r = 0; r < kSumRows; ++r)
#pragma GCC unroll 2
    for (int i = 0; i < vectors; ++i) store(sums + (r0 + r) * kStride + c + i * kLanes, acc[r][i]);
}

// to[r] = factor[r] * the weighted sum of row r, for the rows of the block.
template <class T>
FASTREC_VEC void write_sums(const float* weights, Rows<const T> others, const Block& block,
                            int64_t dims, const float* factor, float* sums, Rows<T> to) {
  for (int64_t r0 = 0; r0 < block.count; r0 += kSumRows)
    for (int64_t c = 0; c < dims; c += kSumVectors * kLanes) {
      const int64_t left = dims - c;
      if (kSumVectors == 2 && left > kLanes) {
        if (left >= 2 * kLanes)
          weighted_sum<kSumVectors, true>(weights, others, block, r0, c, dims, sums);
        else
          weighted_sum<kSumVectors, false>(weights, others, block, r0, c, dims, sums);
      } else if (left >= kLanes) {
        weighted_sum<1, true>(weights, others, block, r0, c, dims, sums);
      } else {
        weighted_sum<1, false>(weights, others, block, r0, c, dims, sums);
      }
    }
  for (int64_t r = 0; r < block.count; ++r) {
    const Floats times = splat(factor[r]);
    for (int64_t c = 0; c < dims; c += kLanes)
      store_row(to[block.begin + r] + c, multiply(times, load(sums + r * kStride + c)),
                first_lanes(dims - c));
  }
}

}  // namespace
}  // namespace fastrec::window_sparse_attention
