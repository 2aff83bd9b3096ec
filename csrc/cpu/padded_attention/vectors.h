// The vector kernel, written once over sixteen lanes; an ISA file includes its vec16 header and
// this one. Keys of one head are transposed once into [D][keys padded to 16], so that scores of a
// block of query rows are outer products in accumulators; the weighted sum keeps the block's rows x
// some dims in accumulators. The block of rows is as high as the registers allow, and all blocks of
// a part have nearly the same height.
#include <algorithm>
#include <limits>

#include "padded_attention/padded_attention.h"

namespace fastrec::padded_attention {
namespace {

int64_t padded(int64_t keys) { return (keys + kLanes - 1) / kLanes * kLanes; }

const float* head_rows(const Rows& rows, const Part& part) {
  return rows.data + part.batch * rows.batch_stride + part.head * rows.head_stride;
}

int64_t scratch_floats(int64_t keys, int64_t head_dim) {
  return padded(keys) * (head_dim + kMaxRows);
}

// e^x for x <= 0: 2^n * e^r, |r| <= ln(2) / 2, Taylor series to r^6 (remainder below 1.3e-7).
// Below -87.7 it is 0; a NaN stays one.
FASTREC_VEC_INLINE Floats exp_nonpositive(Floats x) {
  x = maximum(splat(-110.0f), x);
  const Floats n = round_half_even(multiply(x, splat(1.44269504088896341f)));
  // ln(2) in two parts, so that r is exact to fp32.
  Floats r = fnma(n, splat(0.693359375f), x);
  r = fnma(n, splat(-2.12194440e-4f), r);
  Floats p = splat(1.0f / 720);
  p = fma(p, r, splat(1.0f / 120));
  p = fma(p, r, splat(1.0f / 24));
  p = fma(p, r, splat(1.0f / 6));
  p = fma(p, r, splat(0.5f));
  p = fma(p, r, splat(1.0f));
  p = fma(p, r, splat(1.0f));
  return scale_by_power(p, n);
}

// keys [keys][D] -> [D][padded keys], zeros behind.
FASTREC_VEC __attribute__((noinline)) void transpose(const float* keys, int64_t row_stride,
                                                     int64_t count, int64_t dims, float* out) {
  const int64_t width = padded(count);
  for (int64_t j = 0; j < count; j += kLanes)
    for (int64_t d = 0; d < dims; d += kLanes)
      transpose_tile(keys + j * row_stride + d, row_stride, count - j, dims - d,
                     out + d * width + j, width);
}

// Scaled scores of `rows` query rows x vectors * 16 keys.
template <int rows, int vectors>
FASTREC_VEC __attribute__((noinline)) void scores(const float* const* q, int64_t dims,
                                                  const float* keys,  // [D][width]
                                                  int64_t width, float scale,
                                                  float* out)  // [rows][width]
{
  const float* query[rows];
  Floats acc[rows][vectors];
#pragma GCC unroll 8
  for (int r = 0; r < rows; ++r) {
    query[r] = q[r];
#pragma GCC unroll 4
    for (int c = 0; c < vectors; ++c) acc[r][c] = zeros();
  }
  for (int64_t d = 0; d < dims; ++d, keys += width) {
    Floats key[vectors];
#pragma GCC unroll 4
    for (int c = 0; c < vectors; ++c) key[c] = load(keys + c * kLanes);
#pragma GCC unroll 8
    for (int r = 0; r < rows; ++r) {
      const Floats value = splat(query[r][d]);
#pragma GCC unroll 4
      for (int c = 0; c < vectors; ++c) acc[r][c] = fma(value, key[c], acc[r][c]);
    }
  }
#pragma GCC unroll 8
  for (int r = 0; r < rows; ++r)
#pragma GCC unroll 4
    for (int c = 0; c < vectors; ++c)
      store(out + r * width + c * kLanes, multiply(acc[r][c], splat(scale)));
}

// row += mask, or row = min(row, mask); `keys` floats of each. A NaN in the row stays.
template <bool caps>
FASTREC_VEC_INLINE void apply_mask(float* row, const float* mask, int64_t keys) {
  const int64_t whole = keys / kLanes * kLanes;
  for (int64_t j = 0; j < whole; j += kLanes)
    store(row + j,
          caps ? minimum(load(mask + j), load(row + j)) : add(load(row + j), load(mask + j)));
  if (whole < keys) {
    const Floats last = load(mask + whole, first_lanes(keys - whole));
    store(row + whole, caps ? minimum(last, load(row + whole)) : add(load(row + whole), last));
  }
}

// Turns one row of scores into weights; returns 1 / their sum. Where `padded`, whole registers of
// the row may be read and written.
template <bool padded>
FASTREC_VEC_INLINE float softmax_row(float* row, int64_t keys) {
  const int64_t whole = keys / kLanes * kLanes;
  const Lanes tail = first_lanes(keys - whole);
  Floats highest = splat(-std::numeric_limits<float>::infinity());
  for (int64_t j = 0; j < whole; j += kLanes) highest = maximum(highest, load(row + j));
  Floats last = zeros();
  if (whole < keys) {
    last = padded ? load(row + whole) : load(row + whole, tail);
    highest = blend(tail, maximum(highest, last), highest);
  }
  const Floats top = splat(max_lanes(highest));
  Floats sum = zeros();
  for (int64_t j = 0; j < whole; j += kLanes) {
    const Floats weight = exp_nonpositive(subtract(load(row + j), top));
    store(row + j, weight);
    sum = add(sum, weight);
  }
  if (whole < keys) {
    const Floats weight = exp_nonpositive(subtract(last, top));
    if (padded)
      store(row + whole, weight);
    else
      store(row + whole, weight, tail);
    sum = blend(tail, add(sum, weight), sum);
  }
  return 1.0f / sum_lanes(sum);
}

// For callers that have scores alone.
FASTREC_VEC float softmax(float* row, int64_t keys) { return softmax_row<false>(row, keys); }

// out[r] = inverse_sum[r] * sum_j weights[r][j] * values[j], vectors * 16 dims, the last one up to
// `lanes` where it is not whole.
template <int rows, int vectors, bool whole>
FASTREC_VEC __attribute__((noinline)) void weighted_sum(const float* weights,  // [rows][width]
                                                        int64_t width, int64_t keys,
                                                        const float* values,  // [keys] rows
                                                        int64_t row_stride, int64_t dims,
                                                        const float* inverse_sum, float* out,
                                                        int64_t out_stride) {
  const Lanes lanes = first_lanes(dims - (vectors - 1) * kLanes);
  Floats acc[rows][vectors];
#pragma GCC unroll 8
  for (int r = 0; r < rows; ++r)
#pragma GCC unroll 4
    for (int c = 0; c < vectors; ++c) acc[r][c] = zeros();
  for (int64_t j = 0; j < keys; ++j, values += row_stride) {
    Floats value[vectors];
#pragma GCC unroll 4
    for (int c = 0; c < vectors; ++c)
      value[c] =
          whole || c + 1 < vectors ? load(values + c * kLanes) : load(values + c * kLanes, lanes);
#pragma GCC unroll 8
    for (int r = 0; r < rows; ++r) {
      const Floats weight = splat(weights[r * width + j]);
#pragma GCC unroll 4
      for (int c = 0; c < vectors; ++c) acc[r][c] = fma(weight, value[c], acc[r][c]);
    }
  }
#pragma GCC unroll 8
  for (int r = 0; r < rows; ++r)
#pragma GCC unroll 4
    for (int c = 0; c < vectors; ++c) {
      const Floats mean = multiply(acc[r][c], splat(inverse_sum[r]));
      float* to = out + r * out_stride + c * kLanes;
      if (whole || c + 1 < vectors)
        store(to, mean);
      else
        store(to, mean, lanes);
    }
}

template <int rows>
FASTREC_VEC void score_rows(const float* const* q, int64_t dims, const float* keys, int64_t width,
                            float scale, float* out) {
  int64_t j = 0;
  for (; j + kScoreVectors * kLanes <= width; j += kScoreVectors * kLanes)
    scores<rows, kScoreVectors>(q, dims, keys + j, width, scale, out + j);
  if constexpr (kScoreVectors > 2)
    for (; j + 2 * kLanes <= width; j += 2 * kLanes)
      scores<rows, 2>(q, dims, keys + j, width, scale, out + j);
  if constexpr (kScoreVectors > 1)
    for (; j < width; j += kLanes) scores<rows, 1>(q, dims, keys + j, width, scale, out + j);
}

template <int rows>
FASTREC_VEC void value_rows(const float* weights, int64_t width, int64_t keys, const float* values,
                            int64_t row_stride, int64_t dims, const float* inverse_sum, float* out,
                            int64_t out_stride) {
  int64_t d = 0;
  for (; d + kValueVectors * kLanes <= dims; d += kValueVectors * kLanes)
    weighted_sum<rows, kValueVectors, true>(weights, width, keys, values + d, row_stride,
                                            kValueVectors * kLanes, inverse_sum, out + d,
                                            out_stride);
  // The mask takes registers too: then half of the rows at a time.
  constexpr int first = rows > kMaskedRows ? (rows + 1) / 2 : rows, second = rows - first;
  for (; d < dims; d += kLanes) {
    weighted_sum<first, 1, false>(weights, width, keys, values + d, row_stride, dims - d,
                                  inverse_sum, out + d, out_stride);
    if constexpr (second > 0)
      weighted_sum<second, 1, false>(weights + first * width, width, keys, values + d, row_stride,
                                     dims - d, inverse_sum + first, out + first * out_stride + d,
                                     out_stride);
  }
}

// `rows` query rows from i0 on; keys [D][width] are transposed, weights [rows][width] is scratch.
template <int rows>
FASTREC_VEC void row_block(const Call& call, const Part& part, int64_t i0, int64_t key_count,
                           const float* keys, float* weights) {
  const int64_t dims = call.head_dim, width = padded(key_count);
  const float* const queries = head_rows(call.q, part);
  const float* q[rows];
  for (int r = 0; r < rows; ++r) q[r] = queries + (i0 + r) * call.q.row_stride;
  score_rows<rows>(q, dims, keys, width, call.scale, weights);
  float inverse_sum[rows];
  for (int r = 0; r < rows; ++r) {
    float* const row = weights + r * width;
    if (call.mask.data) {
      const float* const mask = mask_row(call, part, i0 + r);
      if (call.mask.caps)
        apply_mask<true>(row, mask, key_count);
      else
        apply_mask<false>(row, mask, key_count);
      // The first score that is not -inf settles it, mostly the very first.
      if (sees_nothing(row, key_count)) {
        std::fill_n(row, key_count, 0.0f);
        inverse_sum[r] = call.nothing;
        continue;
      }
    }
    inverse_sum[r] = softmax_row<true>(row, key_count);
  }
  value_rows<rows>(weights, width, key_count,
                   head_rows(call.v, part) + call.first_key(part.batch) * call.v.row_stride,
                   call.v.row_stride, dims, inverse_sum,
                   call.out + ((part.batch * call.query_rows + i0) * call.heads + part.head) * dims,
                   call.heads * dims);
}

using RowBlock = void (*)(const Call&, const Part&, int64_t, int64_t, const float*, float*);
constexpr RowBlock kRowBlock[] = {row_block<1>,
                                  row_block<2>,
                                  row_block<3>,
                                  row_block<4>,
                                  row_block<5>,
                                  row_block<6>,
                                  row_block<std::min(7, kMaxRows)>,
                                  row_block<std::min(8, kMaxRows)>};

FASTREC_VEC void part(const Call& call, const Part& part, float* scratch) {
  const int64_t dims = call.head_dim, rows = part.end - part.begin;
  const int64_t first = call.first_key(part.batch), keys = call.end_key(part.batch) - first;
  if (keys == 0) {
    for (int64_t i = part.begin; i < part.end; ++i)
      std::fill_n(call.out + ((part.batch * call.query_rows + i) * call.heads + part.head) * dims,
                  dims, call.nothing);
    return;
  }
  float* const transposed = scratch;                     // [D][width]
  float* const weights = scratch + padded(keys) * dims;  // [kMaxRows][width]
  transpose(head_rows(call.k, part) + first * call.k.row_stride, call.k.row_stride, keys, dims,
            transposed);
  const int64_t blocks = (rows + kMaxRows - 1) / kMaxRows;
  for (int64_t b = 0; b < blocks; ++b) {
    const int64_t begin = b * rows / blocks, end = (b + 1) * rows / blocks;
    kRowBlock[end - begin - 1](call, part, part.begin + begin, keys, transposed, weights);
  }
}

}  // namespace
}  // namespace fastrec::padded_attention
