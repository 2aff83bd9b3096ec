// AVX2: a lane is a query. 8-bit sums of pairs would saturate (vpmaddubsw), so that everything is
// widened to 16 bits and multiplied in pairs (vpmaddwd), which is exact.
//
// Packed, in columns of `stride` positions with room on both sides:
//   keys    [D / 2][stride][2 dims] int16
//   values  [D][stride] int16
#include "window_sparse_attention_int8/window_sparse_attention_int8.h"

#if defined(__x86_64__)
#include <immintrin.h>

#include <cstring>

#include "window_sparse_attention_int8/rows.h"

#define FASTREC_AVX2 __attribute__((target(FASTREC_TARGET_avx2)))
#define FASTREC_INLINE FASTREC_AVX2 inline __attribute__((always_inline))
#define FASTREC_NOINLINE FASTREC_AVX2 __attribute__((noinline))

namespace fastrec::window_sparse_attention_int8 {
namespace {

constexpr int kLanes = 8;
constexpr int kAtOnce = 8;  // keys of scores, or dims of sums, in accumulators

struct Sizes {
  int64_t pairs, dims, stride;
  explicit Sizes(const Call& call)
      : pairs((call.dims + 1) / 2),
        dims((call.dims + kAtOnce - 1) / kAtOnce * kAtOnce),
        // Three vectors of room, so that the dims of one position differ in their cache sets.
        stride((call.key_rows + 15) / 16 * 16 + 48) {}
  int64_t key_bytes() const { return pairs * stride * 4; }
};

int64_t packed_bytes(const Call& call) {
  const Sizes sizes(call);
  return sizes.key_bytes() + sizes.dims * sizes.stride * 2;
}

int64_t most_rows(const Call& call, int64_t far) {
  const int64_t window = std::min(call.pattern.window, call.longest());
  return std::min(call.key_rows, 2 * window + kLanes) + kAtOnce + far;
}

int64_t scratch_ints(const Call& call, int64_t far) {
  const Sizes sizes(call);
  return most_rows(call, far) * kLanes * 2 + far * 2 + (sizes.pairs + sizes.dims) * kLanes;
}

struct Head {
  const int32_t* keys;  // column 0 of position 0
  const int16_t* values;
  Head(const Sizes& sizes, const Packed& packed)
      : keys(reinterpret_cast<const int32_t*>(packed.data) + kLanes),
        values(reinterpret_cast<const int16_t*>(packed.data + sizes.key_bytes()) + kLanes) {}
};

bool pack(const Call& call, int64_t batch, int64_t head, Packed* packed) {
  const Sizes sizes(call);
  float inverse = 0.0f;
  if (call.v_f32) {
    const float largest = largest_value(call, batch, head);
    if (largest < 0) return false;
    packed->v_scale = largest / 127.0f;
    inverse = inverse_scale(largest);
  } else {
    packed->v_scale = value_scale(call, batch, head);
  }
  std::memset(packed->data, 0, static_cast<size_t>(packed_bytes(call)));
  auto* const keys = reinterpret_cast<int16_t*>(packed->data) + 2 * kLanes;
  auto* const values = reinterpret_cast<int16_t*>(packed->data + sizes.key_bytes()) + kLanes;
  const uint8_t k_flip = flip_of(call.k_u8), v_flip = flip_of(call.v_u8);
  const auto* k = head_of<uint8_t>(call.k, batch, head);
  const auto* v_f32 = head_of<float>(call.v, batch, head);
  const auto* v_bytes = head_of<uint8_t>(call.v, batch, head);
  for (int64_t j = 0; j < call.keys(batch); ++j)
    for (int64_t d = 0; d < call.dims; ++d) {
      keys[(d / 2 * sizes.stride + j) * 2 + d % 2] =
          static_cast<int8_t>(k[j * call.k.row_stride + d] ^ k_flip);
      const int64_t at = j * call.v.row_stride + d;
      // Ties to even: the conversion of SSE follows the rounding mode, as nearbyint does.
      values[d * sizes.stride + j] =
          static_cast<int16_t>(call.v_f32 ? _mm_cvtss_si32(_mm_set_ss(v_f32[at] * inverse))
                                          : static_cast<int8_t>(v_bytes[at] ^ v_flip));
    }
  return true;
}

// [D / 2][8 queries][2 dims] int16 without their zero point; rows that are not there are 0.
void pack_queries(const Call& call, int64_t batch, int64_t head, int64_t i0, int64_t rows,
                  int64_t pairs, int32_t* to) {
  auto* const out = reinterpret_cast<int16_t*>(to);
  std::fill_n(to, pairs * kLanes, 0);
  for (int64_t r = 0; r < rows; ++r) {
    const int64_t at = (i0 + r) * call.q.row_stride;
    const auto* q_u8 = head_of<uint8_t>(call.q, batch, head) + at;
    const auto* q_s8 = head_of<int8_t>(call.q, batch, head) + at;
    for (int64_t d = 0; d < call.dims; ++d)
      out[(d / 2 * kLanes + r) * 2 + d % 2] =
          static_cast<int16_t>((call.q_u8 ? q_u8[d] : q_s8[d]) - call.q_zero_point);
  }
}

FASTREC_INLINE __m256i load(const void* from) {
  return _mm256_loadu_si256(static_cast<const __m256i*>(from));
}
FASTREC_INLINE void store(void* to, __m256i x) {
  _mm256_storeu_si256(static_cast<__m256i*>(to), x);
}

// Scores [8 keys][8 queries] of neighbouring keys.
FASTREC_NOINLINE void near_scores(const int32_t* queries, const int32_t* keys, int64_t stride,
                                  int64_t pairs, int32_t* to) {
  __m256i acc[kAtOnce];
#pragma GCC unroll 8
  for (int t = 0; t < kAtOnce; ++t) acc[t] = _mm256_setzero_si256();
  for (int64_t pair = 0; pair < pairs; ++pair) {
    const __m256i query = load(queries + pair * kLanes);
#pragma GCC unroll 8
    for (int t = 0; t < kAtOnce; ++t)
      acc[t] = _mm256_add_epi32(
          acc[t], _mm256_madd_epi16(query, _mm256_set1_epi32(keys[pair * stride + t])));
  }
#pragma GCC unroll 8
  for (int t = 0; t < kAtOnce; ++t) store(to + t * kLanes, acc[t]);
}

FASTREC_NOINLINE void far_scores(const int32_t* queries, const int32_t* keys, int64_t stride,
                                 int64_t pairs, int32_t* to) {
  __m256i acc = _mm256_setzero_si256();
  for (int64_t pair = 0; pair < pairs; ++pair)
    acc = _mm256_add_epi32(
        acc, _mm256_madd_epi16(load(queries + pair * kLanes), load(keys + pair * stride)));
  store(to, acc);
}

// Hides a key from the lanes where not 0 <= first + step * lane <= limit; the highest so far.
FASTREC_INLINE __m256i hide(int32_t* row, int64_t first, int step, int64_t limit, __m256i highest) {
  const __m256i lane = _mm256_setr_epi32(0, 1, 2, 3, 4, 5, 6, 7);
  const __m256i x = _mm256_add_epi32(_mm256_set1_epi32(static_cast<int32_t>(first)),
                                     _mm256_sign_epi32(lane, _mm256_set1_epi32(step)));
  const __m256i low = _mm256_min_epu32(x, _mm256_set1_epi32(static_cast<int32_t>(limit)));
  const __m256i score =
      _mm256_blendv_epi8(_mm256_set1_epi32(kUnseen), load(row), _mm256_cmpeq_epi32(low, x));
  store(row, score);
  return _mm256_max_epi32(highest, score);
}

FASTREC_INLINE __m256i weight(__m256i score, __m256i highest, __m256 exponent_scale) {
  const __m256 t = _mm256_max_ps(
      _mm256_mul_ps(_mm256_cvtepi32_ps(_mm256_sub_epi32(score, highest)), exponent_scale),
      _mm256_set1_ps(kLowest));
  const __m256 n = _mm256_round_ps(t, _MM_FROUND_TO_NEAREST_INT | _MM_FROUND_NO_EXC);
  const __m256 f = _mm256_sub_ps(t, n);
  __m256 p = _mm256_add_ps(_mm256_set1_ps(kC2), _mm256_mul_ps(f, _mm256_set1_ps(kC3)));
  p = _mm256_add_ps(_mm256_set1_ps(kC1), _mm256_mul_ps(f, p));
  p = _mm256_add_ps(_mm256_set1_ps(kTop), _mm256_mul_ps(f, p));
  const __m256i power =
      _mm256_slli_epi32(_mm256_add_epi32(_mm256_cvtps_epi32(n), _mm256_set1_epi32(127)), 23);
  return _mm256_cvtps_epi32(_mm256_mul_ps(p, _mm256_castsi256_ps(power)));
}

// Near rows in pairs of keys [rows / 2][8 queries][2 keys] int16, far rows as int32; their sum.
FASTREC_NOINLINE __m256i weights(const int32_t* scores, int64_t near, int64_t far, __m256i highest,
                                 float exponent_scale, int32_t* to) {
  const __m256 scale = _mm256_set1_ps(exponent_scale);
  __m256i sum = _mm256_setzero_si256();
  for (int64_t n = 0; n < near; n += 2, scores += 2 * kLanes, to += kLanes) {
    const __m256i first = weight(load(scores), highest, scale);
    const __m256i second = weight(load(scores + kLanes), highest, scale);
    sum = _mm256_add_epi32(sum, _mm256_add_epi32(first, second));
    store(to, _mm256_or_si256(first, _mm256_slli_epi32(second, 16)));
  }
  for (int64_t n = 0; n < far; ++n, scores += kLanes, to += kLanes) {
    const __m256i p = weight(load(scores), highest, scale);
    sum = _mm256_add_epi32(sum, p);
    store(to, p);
  }
  return sum;
}

// Eight dims of all queries -> [8 dims][8 queries] floats.
FASTREC_NOINLINE void weighted_sums(const int32_t* weights, const int16_t* values, int64_t stride,
                                    int64_t first, int64_t near, const int64_t* far_first,
                                    int64_t far, __m256 factor, float* to) {
  __m256i acc[kAtOnce];
#pragma GCC unroll 8
  for (int d = 0; d < kAtOnce; ++d) acc[d] = _mm256_setzero_si256();
  for (int64_t n = 0; n < near; n += 2, weights += kLanes) {
    const __m256i p = load(weights);
    const int16_t* pair = values + first + n;
#pragma GCC unroll 8
    for (int d = 0; d < kAtOnce; ++d) {
      int32_t two;
      std::memcpy(&two, pair + d * stride, sizeof(two));
      acc[d] = _mm256_add_epi32(acc[d], _mm256_madd_epi16(p, _mm256_set1_epi32(two)));
    }
  }
  for (int64_t n = 0; n < far; ++n, weights += kLanes) {
    const __m256i p = load(weights);
#pragma GCC unroll 8
    for (int d = 0; d < kAtOnce; ++d) {
      const auto* from = reinterpret_cast<const __m128i*>(values + far_first[n] + d * stride);
      // The upper halves meet the zeros above p.
      const __m256i v = _mm256_cvtepi16_epi32(_mm_loadu_si128(from));
      acc[d] = _mm256_add_epi32(acc[d], _mm256_madd_epi16(p, v));
    }
  }
#pragma GCC unroll 8
  for (int d = 0; d < kAtOnce; ++d)
    _mm256_storeu_ps(to + d * kLanes, _mm256_mul_ps(_mm256_cvtepi32_ps(acc[d]), factor));
}

FASTREC_AVX2 void block(const Call& call, int64_t batch, int64_t head, const Packed& packed,
                        int64_t begin, int64_t end, int32_t* scratch) {
  const Sizes sizes(call);
  const Head tiles(sizes, packed);
  const int64_t keys = call.keys(batch), most_far = call.pattern.far_count(head);
  const int64_t window = std::min(call.pattern.window, call.longest());
  auto* const far_first = reinterpret_cast<int64_t*>(scratch);
  int32_t* const scores = scratch + 2 * most_far;
  int32_t* const bytes = scores + most_rows(call, most_far) * kLanes;
  int32_t* const queries = bytes + most_rows(call, most_far) * kLanes;
  auto* const out = reinterpret_cast<float*>(queries + sizes.pairs * kLanes);
  for (int64_t i0 = begin; i0 < end; i0 += kLanes) {
    const int64_t rows = std::min<int64_t>(kLanes, end - i0);
    pack_queries(call, batch, head, i0, rows, sizes.pairs, queries);
    __m256i highest = _mm256_set1_epi32(kLeastMaximum);
    const int64_t first = call.pattern.window_begin(i0);
    const int64_t seen = std::max<int64_t>(0, call.pattern.window_end(i0 + rows - 1, keys) - first);
    const int64_t near = (seen + kAtOnce - 1) / kAtOnce * kAtOnce;
    const int64_t reach = call.pattern.causal ? window : 2 * window;
    int32_t* row = scores;
    for (int64_t n = 0; n < near; n += kAtOnce) {
      near_scores(queries, tiles.keys + first + n, sizes.stride, sizes.pairs, row);
      for (int64_t t = 0; t < kAtOnce; ++t, row += kLanes)
        // Beyond the last key: a distance that no lane has.
        highest = hide(row, n + t < seen ? first + n + t - i0 + window : -1, -1, reach, highest);
    }
    int64_t far = 0;
    for (int64_t n = 0; n < most_far; ++n) {
      const int64_t key = i0 + call.pattern.far_shift(head, n);  // of lane 0
      if (key <= -kLanes || key >= keys) continue;
      far_scores(queries, tiles.keys + key, sizes.stride, sizes.pairs, row);
      highest = hide(row, key, 1, keys - 1, highest);
      row += kLanes;
      far_first[far++] = key;
    }
    const __m256i sum = weights(scores, near, far, highest, call.exponent_scale, bytes);
    const __m256 none = _mm256_castsi256_ps(_mm256_cmpeq_epi32(sum, _mm256_setzero_si256()));
    const __m256 factor = _mm256_andnot_ps(
        none, _mm256_div_ps(_mm256_set1_ps(packed.v_scale), _mm256_cvtepi32_ps(sum)));
    for (int64_t d = 0; d < sizes.dims; d += kAtOnce)
      weighted_sums(bytes, tiles.values + d * sizes.stride, sizes.stride, first, near, far_first,
                    far, factor, out + d * kLanes);
    for (int64_t r = 0; r < rows; ++r)
      store_row(call, batch, head, i0 + r, [&](int64_t d) { return out[d * kLanes + r]; });
  }
}

}  // namespace

const Kernel kAvx2 = {Isa::avx2, packed_bytes, scratch_ints, pack, block};

}  // namespace fastrec::window_sparse_attention_int8
#endif
