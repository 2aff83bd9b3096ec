// Forward and gradients over blocks of 16 rows, for every vector instruction set. Included after
// vec16_<isa>.h and the ISA's register blocking:
//   kNearKeys: scores of that many window rows at once, a multiple of 3;
//   kSumRows x kSumVectors: rows and registers of dims of a weighted sum.
#pragma once

#include <cmath>
#include <limits>

#include "vec16_math.h"
#include "window_sparse_attention/block.h"

namespace fastrec::window_sparse_attention {
namespace {

constexpr float kLog2E = 1.44269504088896341f, kLn2 = 0.693147180559945309f;
constexpr float kMinusInfinity = -std::numeric_limits<float>::infinity();

// Parts of one thread's scratch; two of each, as gradients need a second kind of score.
struct Memory {
  LaneRows lanes[2];
  float *packed, *sums;
  Far* far;
  float *first, *second;  // scores
};

int64_t most_far(const Pattern& pattern) {
  size_t most = 0;
  for (const auto& list : pattern.distances) most = std::max(most, list.size());
  return 2 * static_cast<int64_t>(most);
}

int64_t score_floats(const Pattern& pattern, int64_t rows) {
  const int64_t nears = std::min(rows, 2 * pattern.window + kLanes);
  return (nears + most_far(pattern) + kNearKeys) * kLanes;
}

int64_t scratch_floats(const Pattern& pattern, int64_t rows, int64_t dims) {
  constexpr int64_t kFarFloats = sizeof(Far) / sizeof(float);
  return 2 * (kLanes * kStride + dims * kLanes) + (kNearKeys + kLanes) * kStride +
         (most_far(pattern) + kLanes) * kFarFloats + 2 * score_floats(pattern, rows);
}

Memory lay_out(float* scratch, const Pattern& pattern, int64_t rows, int64_t dims) {
  const auto take = [&](int64_t floats) {
    float* const from = scratch;
    scratch += floats;
    return from;
  };
  Memory m;
  for (LaneRows& lanes : m.lanes) lanes = {take(kLanes * kStride), take(dims * kLanes)};
  m.packed = take(kNearKeys * kStride);
  m.sums = take(kLanes * kStride);
  m.first = take(score_floats(pattern, rows));
  m.second = take(score_floats(pattern, rows));
  m.far = static_cast<Far*>(static_cast<void*>(scratch));
  return m;
}

// Scores in powers of two become weights, not yet divided by their sums.
FASTREC_VEC void softmax(const Block& block, float* weights, float* highest, float* total) {
  const Floats lowest = splat(kMinusInfinity);
  Floats high = lowest;
  const auto mask = [&](float* at, LaneRange range) FASTREC_VEC {
    Floats x = load(at);
    if (range.partial()) store(at, x = within(range, x, lowest));
    high = maximum(high, x);
  };
  float* at = weights;
  for (int64_t n = 0; n < block.nears; ++n, at += kLanes) mask(at, lanes_of(block, n));
  for (int64_t f = 0; f < block.fars; ++f, at += kLanes)
    mask(at, {block.far[f].first, block.far[f].last});
  store(highest, high);
  // A row that meets nothing: -inf minus a number, not minus -inf.
  high = maximum(splat(std::numeric_limits<float>::lowest()), high);
  Floats sum = zeros();
  for (float* w = weights; w < at; w += kLanes) {
    const Floats weight = exp2(subtract(load(w), high));
    store(w, weight);
    sum = add(sum, weight);
  }
  store(total, sum);
}

template <class T>
FASTREC_VEC void forward(const Forward& call, const Part& part, float* scratch) {
  const Pattern& pattern = *call.pattern;
  const int64_t dims = call.shape.dims;
  const auto q = rows_of<const T>(call.q, part), k = rows_of<const T>(call.k, part),
             v = rows_of<const T>(call.v, part);
  const auto out = rows_of<T>(call.out, part);
  const auto lse = rows_of<float>(call.lse, part);
  const Memory m = lay_out(scratch, pattern, part.rows, dims);
  alignas(64) float highest[kLanes], total[kLanes], inverse[kLanes];
  for (int64_t i = part.begin; i < part.end; i += kLanes) {
    const Block block = make_block(pattern, part, i, part.keys, true, !pattern.causal, m.far);
    pack_lanes(q, block, dims, call.scale * kLog2E, m.lanes[0]);
    scores(m.lanes[0], k, block, dims, m.packed, m.first);
    softmax(block, m.first, highest, total);
    // The highest weight of a row is 1, so only a row that meets nothing has a lower sum: 0.
    store(inverse, divide(splat(1.0f), maximum(splat(0.5f), load(total))));
    write_sums(m.first, v, block, dims, inverse, m.sums, out);
    if (lse.data)
      for (int64_t r = 0; r < block.count; ++r)
        *lse[i + r] = total[r] == 0.0f ? kMinusInfinity : highest[r] * kLn2 + std::log(total[r]);
  }
}

template <class T>
FASTREC_VEC void delta(const Backward& call, const Part& part) {
  const auto out = rows_of<const T>(call.out, part), d_out = rows_of<const T>(call.d_out, part);
  const auto d_lse = rows_of<float>(call.d_lse, part), delta = rows_of<float>(call.delta, part);
  for (int64_t i = part.begin; i < part.end; ++i) {
    Floats sum = zeros();
    for (int64_t c = 0; c < call.shape.dims; c += kLanes) {
      const Lanes lanes = first_lanes(call.shape.dims - c);
      sum = fma(load_row(out[i] + c, lanes), load_row(d_out[i] + c, lanes), sum);
    }
    *delta[i] = sum_lanes(sum) - (d_lse.data ? *d_lse[i] : 0.0f);
  }
}

// Scores become weights, and the gradients of weights become those of scores (before the scale).
FASTREC_VEC_INLINE void to_gradients(LaneRange range, Floats log2_sum, Floats delta, float* weights,
                                     float* grads) {
  Floats weight = exp2(subtract(load(weights), log2_sum));
  Floats grad = multiply(weight, subtract(load(grads), delta));
  if (range.partial()) {
    weight = within(range, weight, zeros());
    grad = within(range, grad, zeros());
  }
  store(weights, weight);
  store(grads, grad);
}

// Sixteen numbers, one a row; zeros outside of the range, which is not read.
FASTREC_VEC_INLINE Floats load_lanes(Rows<float> rows, int64_t begin, LaneRange range) {
  if (rows.stride == 1 && !range.partial()) return load(rows[begin]);
  alignas(64) float lanes[kLanes] = {};
  for (int64_t r = range.first; r < range.last; ++r) lanes[r] = *rows[begin + r];
  return load(lanes);
}

template <class T>
FASTREC_VEC void grad_q(const Backward& call, const Part& part, float* scratch) {
  const Pattern& pattern = *call.pattern;
  const int64_t dims = call.shape.dims;
  const auto q = rows_of<const T>(call.q, part), k = rows_of<const T>(call.k, part),
             v = rows_of<const T>(call.v, part), d_out = rows_of<const T>(call.d_out, part);
  const auto dq = rows_of<T>(call.dq, part);
  const auto lse = rows_of<float>(call.lse, part), delta = rows_of<float>(call.delta, part);
  const Memory m = lay_out(scratch, pattern, part.rows, dims);
  alignas(64) float factor[kLanes];
  std::fill_n(factor, kLanes, call.scale);
  for (int64_t i = part.begin; i < part.end; i += kLanes) {
    const Block block = make_block(pattern, part, i, part.keys, true, !pattern.causal, m.far);
    pack_lanes(q, block, dims, call.scale * kLog2E, m.lanes[0]);
    pack_lanes(d_out, block, dims, 1.0f, m.lanes[1]);
    scores(m.lanes[0], k, block, dims, m.packed, m.first);
    scores(m.lanes[1], v, block, dims, m.packed, m.second);
    const Floats log2_sum = multiply(splat(kLog2E), load_lanes(lse, i, {0, block.count}));
    const Floats delta_lanes = load_lanes(delta, i, {0, block.count});
    for (int64_t p = 0; p < block.pairs(); ++p) {
      const LaneRange range = p < block.nears ? lanes_of(block, p)
                                              : LaneRange{block.far[p - block.nears].first,
                                                          block.far[p - block.nears].last};
      to_gradients(range, log2_sum, delta_lanes, m.first + p * kLanes, m.second + p * kLanes);
    }
    write_sums(m.second, k, block, dims, factor, m.sums, dq);
  }
}

template <class T>
FASTREC_VEC void grad_kv(const Backward& call, const Part& part, float* scratch) {
  const Pattern& pattern = *call.pattern;
  const int64_t dims = call.shape.dims;
  const auto q = rows_of<const T>(call.q, part), k = rows_of<const T>(call.k, part),
             v = rows_of<const T>(call.v, part), d_out = rows_of<const T>(call.d_out, part);
  const auto dk = rows_of<T>(call.dk, part), dv = rows_of<T>(call.dv, part);
  const auto lse = rows_of<float>(call.lse, part), delta = rows_of<float>(call.delta, part);
  const Memory m = lay_out(scratch, pattern, part.rows, dims);
  alignas(64) float factor[kLanes], one[kLanes];
  std::fill_n(factor, kLanes, call.scale);
  std::fill_n(one, kLanes, 1.0f);
  // Keys beyond the length are lanes of no block, and their gradients zero.
  Part valid = part;
  valid.end = std::min(part.end, part.keys);
  for (int64_t j = std::max(part.begin, part.keys); j < part.end; ++j) {
    const Floats zero = zeros();
    for (int64_t c = 0; c < dims; c += kLanes) {
      store_row(dk[j] + c, zero, first_lanes(dims - c));
      store_row(dv[j] + c, zero, first_lanes(dims - c));
    }
  }
  for (int64_t j = valid.begin; j < valid.end; j += kLanes) {
    const Block block = make_block(pattern, valid, j, part.rows, !pattern.causal, true, m.far);
    pack_lanes(k, block, dims, call.scale * kLog2E, m.lanes[0]);
    pack_lanes(v, block, dims, 1.0f, m.lanes[1]);
    scores(m.lanes[0], q, block, dims, m.packed, m.first);
    scores(m.lanes[1], d_out, block, dims, m.packed, m.second);
    float *weights = m.first, *grads = m.second;
    for (int64_t n = 0; n < block.nears; ++n, weights += kLanes, grads += kLanes) {
      const int64_t i = block.near_begin + n;
      to_gradients(lanes_of(block, n), splat(kLog2E * *lse[i]), splat(*delta[i]), weights, grads);
    }
    for (int64_t f = 0; f < block.fars; ++f, weights += kLanes, grads += kLanes) {
      const Far& far = block.far[f];
      const LaneRange range = {far.first, far.last};
      to_gradients(range, multiply(splat(kLog2E), load_lanes(lse, far.row, range)),
                   load_lanes(delta, far.row, range), weights, grads);
    }
    write_sums(m.first, d_out, block, dims, one, m.sums, dv);
    write_sums(m.second, q, block, dims, factor, m.sums, dk);
  }
}

}  // namespace
}  // namespace fastrec::window_sparse_attention

// After the templates that it instantiates.
#include "window_sparse_attention/any_dtype.h"
