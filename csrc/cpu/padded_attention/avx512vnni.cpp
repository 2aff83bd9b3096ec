// AVX-512: keys of one head are transposed once into [D][keys padded to 16], so that 4 query rows x
// 64 keys of scores are 16 accumulators; the weighted sum keeps 8 rows x 32 dims in 16
// accumulators.
#include "padded_attention/padded_attention.h"

#if defined(__x86_64__)
#include <immintrin.h>

#include <algorithm>
#include <limits>

#define FASTREC_AVX512VNNI __attribute__((target(FASTREC_TARGET_avx512vnni)))
#define FASTREC_INLINE FASTREC_AVX512VNNI inline __attribute__((always_inline))

namespace fastrec::padded_attention {
namespace {

constexpr int kLanes = 16;
constexpr int kRows = 8;          // query rows a block: scores in two halves of 4
constexpr int kScoreRows = 4;     // x kScoreVectors accumulators
constexpr int kScoreVectors = 4;  // of 16 keys
constexpr int kValueVectors = 2;  // of 16 dims, x kRows accumulators

int64_t padded(int64_t keys) { return (keys + kLanes - 1) / kLanes * kLanes; }

int64_t scratch_floats(int64_t keys, int64_t head_dim) { return padded(keys) * (head_dim + kRows); }

FASTREC_INLINE __mmask16 first_lanes(int64_t count) {
  return count >= kLanes ? 0xffff : static_cast<__mmask16>((1u << count) - 1);
}

// e^x for x <= 0: 2^n * e^r, |r| <= ln(2) / 2, Taylor series to r^6 (remainder below 1.3e-7).
FASTREC_INLINE __m512 exp_nonpositive(__m512 x) {
  const __m512 n = _mm512_roundscale_ps(_mm512_mul_ps(x, _mm512_set1_ps(1.44269504088896341f)),
                                        _MM_FROUND_TO_NEAREST_INT | _MM_FROUND_NO_EXC);
  // ln(2) in two parts, so that r is exact to fp32.
  __m512 r = _mm512_fnmadd_ps(n, _mm512_set1_ps(0.693359375f), x);
  r = _mm512_fnmadd_ps(n, _mm512_set1_ps(-2.12194440e-4f), r);
  __m512 p = _mm512_set1_ps(1.0f / 720);
  p = _mm512_fmadd_ps(p, r, _mm512_set1_ps(1.0f / 120));
  p = _mm512_fmadd_ps(p, r, _mm512_set1_ps(1.0f / 24));
  p = _mm512_fmadd_ps(p, r, _mm512_set1_ps(1.0f / 6));
  p = _mm512_fmadd_ps(p, r, _mm512_set1_ps(0.5f));
  p = _mm512_fmadd_ps(p, r, _mm512_set1_ps(1.0f));
  p = _mm512_fmadd_ps(p, r, _mm512_set1_ps(1.0f));
  return _mm512_scalef_ps(p, n);
}

// keys [keys][D] -> [D][padded keys], zeros behind.
FASTREC_AVX512VNNI void transpose(const float* keys, int64_t row_stride, int64_t count,
                                  int64_t dims, float* out) {
  const int64_t width = padded(count);
  for (int64_t j0 = 0; j0 < width; j0 += kLanes) {
    const __mmask16 lanes = first_lanes(count - j0);
    const __m512i lane_i32x16 =
        _mm512_setr_epi32(0, 1, 2, 3, 4, 5, 6, 7, 8, 9, 10, 11, 12, 13, 14, 15);
    const __m512i index =
        _mm512_mullo_epi32(lane_i32x16, _mm512_set1_epi32(static_cast<int32_t>(row_stride)));
    const float* from = keys + j0 * row_stride;
    for (int64_t d = 0; d < dims; ++d)
      _mm512_storeu_ps(out + d * width + j0,
                       _mm512_mask_i32gather_ps(_mm512_setzero_ps(), lanes, index, from + d, 4));
  }
}

// Scores of kScoreRows query rows x kScoreVectors * 16 keys, scaled. q rows beyond the part repeat
// the last one.
template <int vectors>
FASTREC_AVX512VNNI __attribute__((noinline)) void scores(const float* const* q,  // [kScoreRows]
                                                         int64_t dims,
                                                         const float* keys,  // [D][width]
                                                         int64_t width, float scale,
                                                         float* out)  // [kScoreRows][width]
{
  __m512 acc[kScoreRows][vectors];
#pragma GCC unroll 4
  for (int r = 0; r < kScoreRows; ++r)
#pragma GCC unroll 4
    for (int c = 0; c < vectors; ++c) acc[r][c] = _mm512_setzero_ps();
  for (int64_t d = 0; d < dims; ++d) {
    __m512 key[vectors];
#pragma GCC unroll 4
    for (int c = 0; c < vectors; ++c) key[c] = _mm512_loadu_ps(keys + d * width + c * kLanes);
#pragma GCC unroll 4
    for (int r = 0; r < kScoreRows; ++r) {
      const __m512 query = _mm512_set1_ps(q[r][d]);
#pragma GCC unroll 4
      for (int c = 0; c < vectors; ++c) acc[r][c] = _mm512_fmadd_ps(query, key[c], acc[r][c]);
    }
  }
  const __m512 scale_f32x16 = _mm512_set1_ps(scale);
#pragma GCC unroll 4
  for (int r = 0; r < kScoreRows; ++r)
#pragma GCC unroll 4
    for (int c = 0; c < vectors; ++c)
      _mm512_storeu_ps(out + r * width + c * kLanes, _mm512_mul_ps(acc[r][c], scale_f32x16));
}

using Scores = void (*)(const float* const*, int64_t, const float*, int64_t, float, float*);
constexpr Scores kScores[kScoreVectors] = {scores<1>, scores<2>, scores<3>, scores<4>};

// Turns one row of scores into weights; returns 1 / their sum.
FASTREC_AVX512VNNI float softmax_row(float* row, int64_t keys) {
  const __m512 lowest = _mm512_set1_ps(-std::numeric_limits<float>::infinity());
  __m512 highest = lowest;
  for (int64_t j = 0; j < keys; j += kLanes)
    highest = _mm512_mask_max_ps(highest, first_lanes(keys - j), highest, _mm512_loadu_ps(row + j));
  const __m512 top = _mm512_set1_ps(_mm512_reduce_max_ps(highest));
  __m512 sum = _mm512_setzero_ps();
  for (int64_t j = 0; j < keys; j += kLanes) {
    const __m512 weight = exp_nonpositive(_mm512_sub_ps(_mm512_loadu_ps(row + j), top));
    _mm512_storeu_ps(row + j, weight);
    sum = _mm512_mask_add_ps(sum, first_lanes(keys - j), sum, weight);
  }
  return 1.0f / _mm512_reduce_add_ps(sum);
}

// Masked stores are many times slower than plain ones on some CPUs (AMD Zen 4).
FASTREC_INLINE void store(float* to, __mmask16 lanes, __m512 value) {
  if (lanes == 0xffff)
    _mm512_storeu_ps(to, value);
  else
    _mm512_mask_storeu_ps(to, lanes, value);
}

// out[r] = inverse_sum[r] * sum_j weights[r][j] * values[j], 32 dims at a time.
FASTREC_AVX512VNNI __attribute__((noinline)) void weighted_sum(
    const float* weights,  // [kRows][width]
    int64_t width, int64_t keys,
    const float* values,  // [keys] rows of the head, from this dim on
    int64_t row_stride, int64_t dims_left, const float* inverse_sum, float* const* out) {
  const __mmask16 low = first_lanes(dims_left),
                  high = first_lanes(std::max<int64_t>(dims_left - kLanes, 0));
  __m512 acc[kRows][kValueVectors];
#pragma GCC unroll 8
  for (int r = 0; r < kRows; ++r) acc[r][0] = acc[r][1] = _mm512_setzero_ps();
  for (int64_t j = 0; j < keys; ++j) {
    const __m512 value0 = _mm512_maskz_loadu_ps(low, values + j * row_stride);
    const __m512 value1 = _mm512_maskz_loadu_ps(high, values + j * row_stride + kLanes);
#pragma GCC unroll 8
    for (int r = 0; r < kRows; ++r) {
      const __m512 weight = _mm512_set1_ps(weights[r * width + j]);
      acc[r][0] = _mm512_fmadd_ps(weight, value0, acc[r][0]);
      acc[r][1] = _mm512_fmadd_ps(weight, value1, acc[r][1]);
    }
  }
#pragma GCC unroll 8
  for (int r = 0; r < kRows; ++r) {
    const __m512 inverse = _mm512_set1_ps(inverse_sum[r]);
    store(out[r], low, _mm512_mul_ps(acc[r][0], inverse));
    store(out[r] + kLanes, high, _mm512_mul_ps(acc[r][1], inverse));
  }
}

FASTREC_AVX512VNNI void part(const Call& call, const Part& part, float* scratch) {
  const int64_t dims = call.head_dim;
  const int64_t keys = call.lengths ? call.lengths[part.batch] : call.key_rows;
  const int64_t offset = part.head * dims;
  const auto out_row = [&](int64_t i) {
    return call.out + ((part.batch * call.query_rows + i) * call.heads + part.head) * dims;
  };
  if (keys == 0) {
    for (int64_t i = part.begin; i < part.end; ++i) std::fill_n(out_row(i), dims, 0.0f);
    return;
  }
  const int64_t width = padded(keys);
  float* const transposed = scratch;              // [D][width]
  float* const weights = scratch + width * dims;  // [kRows][width]
  transpose(call.k.data + part.batch * call.k.batch_stride + offset, call.k.row_stride, keys, dims,
            transposed);
  const float* const queries = call.q.data + part.batch * call.q.batch_stride + offset;
  const float* const values = call.v.data + part.batch * call.v.batch_stride + offset;

  for (int64_t i0 = part.begin; i0 < part.end; i0 += kRows) {
    const float* q[kRows];
    float* out[kRows];
    float inverse_sum[kRows];
    for (int r = 0; r < kRows; ++r) {
      // Rows beyond the end repeat the last one: computed again, stored again, never read outside.
      const int64_t i = std::min(i0 + r, part.end - 1);
      q[r] = queries + i * call.q.row_stride;
      out[r] = out_row(i);
    }
    for (int64_t j = 0; j < width; j += kScoreVectors * kLanes) {
      const int64_t vectors = std::min<int64_t>(kScoreVectors, (width - j) / kLanes);
      for (int r = 0; r < kRows; r += kScoreRows)
        kScores[vectors - 1](q + r, dims, transposed + j, width, call.scale,
                             weights + r * width + j);
    }
    for (int r = 0; r < kRows; ++r) inverse_sum[r] = softmax_row(weights + r * width, keys);
    for (int64_t d = 0; d < dims; d += kValueVectors * kLanes) {
      float* shifted[kRows];
      for (int r = 0; r < kRows; ++r) shifted[r] = out[r] + d;
      weighted_sum(weights, width, keys, values + d, call.v.row_stride, dims - d, inverse_sum,
                   shifted);
    }
  }
}

}  // namespace

const Kernel kAvx512vnni = {Isa::avx512vnni, scratch_floats, part};

}  // namespace fastrec::padded_attention
#endif
