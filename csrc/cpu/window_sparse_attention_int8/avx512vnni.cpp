// AVX-512 VNNI: a lane is a query. 16 queries meet 16 keys at a time, and the far positions of 16
// neighbouring queries are 16 neighbouring keys, so that softmax needs no sum across lanes.
//
// A signed q is moved to u8 by +128, which its zero point takes back exactly.
#include "window_sparse_attention_int8/window_sparse_attention_int8.h"

#if defined(__x86_64__)
#include "window_sparse_attention_int8/avx512vnni_tiles.h"

namespace fastrec::window_sparse_attention_int8 {
namespace {

struct Far {
  const uint8_t* values;  // tile of the first query's key
  int64_t shift;          // that key's place in the tile
};

int64_t most_tiles(const Call& call) {
  const int64_t window = std::min(call.pattern.window, call.longest());
  return std::min(Sizes(call).tiles, (2 * window + 2 * kTile) / kTile + 2);
}

int64_t scratch_ints(const Call& call, int64_t far) {
  const int64_t rows = most_tiles(call) * kTile + far + 4;
  const int64_t lines = Sizes(call).lines;
  const int64_t far_ints = static_cast<int64_t>(sizeof(Far) / sizeof(int32_t));
  return rows * kLineInts + rows * 4 + (far + 4) * far_ints + 2 * lines * kLineInts +
         4 * lines * kTile;
}

// Scores [keys][16 queries] of a tile's first keys.
template <int kKeys>
FASTREC_NOINLINE void tile_scores(const uint8_t* queries, const uint8_t* keys, const int32_t* bias,
                                  int64_t lines, int32_t* to) {
  __m512i acc[kKeys];
#pragma GCC unroll 16
  for (int t = 0; t < kKeys; ++t) acc[t] = _mm512_set1_epi32(bias[t]);
  for (int64_t line = 0; line < lines; ++line) {
    const __m512i query = _mm512_load_si512(queries + line * kLine);
    const auto* key = reinterpret_cast<const int32_t*>(keys + line * kLine);
#pragma GCC unroll 16
    for (int t = 0; t < kKeys; ++t)
      acc[t] = _mm512_dpbusd_epi32(acc[t], query, _mm512_set1_epi32(key[t]));
  }
#pragma GCC unroll 16
  for (int t = 0; t < kKeys; ++t) _mm512_store_si512(to + t * kLineInts, acc[t]);
}
constexpr decltype(&tile_scores<kTile>) kTileScores[] = {tile_scores<4>, tile_scores<8>,
                                                         tile_scores<12>, tile_scores<16>};

// Of rows that all lanes see.
FASTREC_INLINE __m512i highest_of(const int32_t* scores, int64_t rows, __m512i highest) {
  for (int64_t r = 0; r < rows; ++r)
    highest = _mm512_max_epi32(highest, _mm512_load_si512(scores + r * kLineInts));
  return highest;
}

// Score of query lane r with the key at r + shift of the tile and the next one.
FASTREC_INLINE __m512i far_scores(const uint8_t* queries, const uint8_t* keys, int64_t shift,
                                  int64_t tile_bytes, int64_t lines, __m512i acc) {
  if (shift == 0) {
    for (int64_t line = 0; line < lines; ++line)
      acc = _mm512_dpbusd_epi32(acc, _mm512_load_si512(queries + line * kLine),
                                _mm512_load_si512(keys + line * kLine));
    return acc;
  }
  const __m512i index =
      _mm512_add_epi32(_mm512_setr_epi32(0, 1, 2, 3, 4, 5, 6, 7, 8, 9, 10, 11, 12, 13, 14, 15),
                       _mm512_set1_epi32(static_cast<int32_t>(shift)));
  for (int64_t line = 0; line < lines; ++line) {
    const __m512i key =
        _mm512_permutex2var_epi32(_mm512_load_si512(keys + line * kLine), index,
                                  _mm512_load_si512(keys + tile_bytes + line * kLine));
    acc = _mm512_dpbusd_epi32(acc, _mm512_load_si512(queries + line * kLine), key);
  }
  return acc;
}

FASTREC_INLINE __m512i weight(__m512i score, __m512i highest, __m512 exponent_scale) {
  const __m512 t = _mm512_max_ps(
      _mm512_mul_ps(_mm512_cvtepi32_ps(_mm512_sub_epi32(score, highest)), exponent_scale),
      _mm512_set1_ps(kLowest));
  const __m512 n = _mm512_roundscale_ps(t, _MM_FROUND_TO_NEAREST_INT | _MM_FROUND_NO_EXC);
  const __m512 f = _mm512_sub_ps(t, n);
  __m512 p = _mm512_add_ps(_mm512_set1_ps(kC2), _mm512_mul_ps(f, _mm512_set1_ps(kC3)));
  p = _mm512_add_ps(_mm512_set1_ps(kC1), _mm512_mul_ps(f, p));
  p = _mm512_add_ps(_mm512_set1_ps(kTop), _mm512_mul_ps(f, p));
  return _mm512_cvtps_epi32(_mm512_scalef_ps(p, n));
}

// Rows of scores, 4 at a time -> bytes [rows / 4][16 queries][4 keys]; the sum of each query.
FASTREC_NOINLINE __m512i weights(const int32_t* scores, int64_t rows, __m512i highest,
                                 float exponent_scale, int32_t* to) {
  const __m512 scale = _mm512_set1_ps(exponent_scale);
  __m512i sum = _mm512_setzero_si512();
  for (int64_t row = 0; row < rows; row += 4) {
    __m512i p[4];
#pragma GCC unroll 4
    for (int i = 0; i < 4; ++i)
      p[i] = weight(_mm512_load_si512(scores + (row + i) * kLineInts), highest, scale);
    const __m512i low = _mm512_or_si512(p[0], _mm512_slli_epi32(p[1], 8));
    const __m512i high = _mm512_or_si512(p[2], _mm512_slli_epi32(p[3], 8));
    const __m512i four = _mm512_or_si512(low, _mm512_slli_epi32(high, 16));
    sum = _mm512_dpbusd_epi32(sum, four, _mm512_set1_epi8(1));
    _mm512_store_si512(to + row * 4, four);
  }
  return sum;
}

// Control bytes: [shift, shift + 16) moves bytes down by shift, what leaves a tile is 0.
alignas(16) constexpr int8_t kShift[48] = {
    -128, -128, -128, -128, -128, -128, -128, -128, -128, -128, -128, -128, -128, -128, -128, -128,
    0,    1,    2,    3,    4,    5,    6,    7,    8,    9,    10,   11,   12,   13,   14,   15,
    -128, -128, -128, -128, -128, -128, -128, -128, -128, -128, -128, -128, -128, -128, -128, -128};

FASTREC_INLINE __m512i shift_control(const int8_t* from) {
  return _mm512_broadcast_i32x4(_mm_loadu_si128(reinterpret_cast<const __m128i*>(from)));
}

FASTREC_INLINE __m512i far_values(const Far& far, int64_t at, int64_t tile_bytes) {
  const __m512i here = _mm512_load_si512(far.values + at);
  if (far.shift == 0) return here;
  const __m512i next = _mm512_load_si512(far.values + tile_bytes + at);
  return _mm512_or_si512(_mm512_shuffle_epi8(here, shift_control(kShift + 16 + far.shift)),
                         _mm512_shuffle_epi8(next, shift_control(kShift + far.shift)));
}

// Sums of two lines of values: acc[line][m] holds [4 dims][queries 4 m .. 4 m + 3].
struct Sums {
  __m512i acc[2][4];
};

FASTREC_INLINE __m512i four_queries(const int32_t* weights, int m) {
  return _mm512_broadcast_i32x4(_mm_load_si128(reinterpret_cast<const __m128i*>(weights + 4 * m)));
}

// `fours`: groups of 4 keys in a row of tiles, the last of which may hold less than 4.
FASTREC_NOINLINE void weighted_sums(const int32_t* weights, const uint8_t* values, int64_t fours,
                                    int64_t tile_bytes, const Far* far, int64_t far_count,
                                    int64_t at, Sums* sums) {
  __m512i acc[2][4];
#pragma GCC unroll 4
  for (int m = 0; m < 4; ++m) acc[0][m] = acc[1][m] = _mm512_setzero_si512();
  values += at;
  for (; fours >= 4; fours -= 4, values += tile_bytes) {
    const __m512i v0 = _mm512_load_si512(values), v1 = _mm512_load_si512(values + kLine);
    // Each dim's keys 4 g .. 4 g + 3 to all four queries of its lane.
    const __m512i keys0[4] = {_mm512_shuffle_epi32(v0, static_cast<_MM_PERM_ENUM>(0x00)),
                              _mm512_shuffle_epi32(v0, static_cast<_MM_PERM_ENUM>(0x55)),
                              _mm512_shuffle_epi32(v0, static_cast<_MM_PERM_ENUM>(0xaa)),
                              _mm512_shuffle_epi32(v0, static_cast<_MM_PERM_ENUM>(0xff))};
    const __m512i keys1[4] = {_mm512_shuffle_epi32(v1, static_cast<_MM_PERM_ENUM>(0x00)),
                              _mm512_shuffle_epi32(v1, static_cast<_MM_PERM_ENUM>(0x55)),
                              _mm512_shuffle_epi32(v1, static_cast<_MM_PERM_ENUM>(0xaa)),
                              _mm512_shuffle_epi32(v1, static_cast<_MM_PERM_ENUM>(0xff))};
#pragma GCC unroll 4
    for (int g = 0; g < 4; ++g)
#pragma GCC unroll 4
      for (int m = 0; m < 4; ++m) {
        const __m512i p = four_queries(weights + g * kLineInts, m);
        acc[0][m] = _mm512_dpbusd_epi32(acc[0][m], p, keys0[g]);
        acc[1][m] = _mm512_dpbusd_epi32(acc[1][m], p, keys1[g]);
      }
    weights += 4 * kLineInts;
  }
  for (int64_t g = 0; g < fours; ++g, weights += kLineInts) {
    const __m512i four = _mm512_set1_epi32(static_cast<int32_t>(0x03020100 + g * 0x04040404));
    const __m512i keys0 = _mm512_shuffle_epi8(_mm512_load_si512(values), four);
    const __m512i keys1 = _mm512_shuffle_epi8(_mm512_load_si512(values + kLine), four);
#pragma GCC unroll 4
    for (int m = 0; m < 4; ++m) {
      const __m512i p = four_queries(weights, m);
      acc[0][m] = _mm512_dpbusd_epi32(acc[0][m], p, keys0);
      acc[1][m] = _mm512_dpbusd_epi32(acc[1][m], p, keys1);
    }
  }
  for (int64_t n = 0; n < far_count; n += 4) {
#pragma GCC unroll 2
    for (int line = 0; line < 2; ++line) {
      __m512i v[4];
#pragma GCC unroll 4
      for (int i = 0; i < 4; ++i) v[i] = far_values(far[n + i], at + line * kLine, tile_bytes);
      __m512i four[4];
      interleave(v, four);
#pragma GCC unroll 4
      for (int m = 0; m < 4; ++m)
        acc[line][m] = _mm512_dpbusd_epi32(acc[line][m], four_queries(weights, m), four[m]);
    }
    weights += kLineInts;
  }
#pragma GCC unroll 4
  for (int m = 0; m < 4; ++m) {
    _mm512_storeu_si512(&sums->acc[0][m], acc[0][m]);
    _mm512_storeu_si512(&sums->acc[1][m], acc[1][m]);
  }
}

// Rows of 4 * lines floats -> the output's rows.
FASTREC_VNNI void store_rows(const Call& call, int64_t first, int64_t rows, const float* from,
                             int64_t stride) {
  const __m512 inverse = _mm512_set1_ps(1.0f / call.out_scale);
  const __m512 zero = _mm512_set1_ps(static_cast<float>(call.out_zero_point));
  const __m512 least = _mm512_sub_ps(_mm512_setzero_ps(), zero);
  const __m512 most = _mm512_sub_ps(_mm512_set1_ps(255.0f), zero);
  for (int64_t r = 0; r < rows; ++r) {
    const float* row = from + r * stride;
    const int64_t at = first + r * call.out.row_stride;
    if (!call.out_u8) {
      std::copy_n(row, call.dims, static_cast<float*>(call.out.data) + at);
      continue;
    }
    for (int64_t d = 0; d < call.dims; d += kTile) {
      const auto lanes = static_cast<__mmask16>(first_bytes(call.dims - d));
      const __m512 value = _mm512_mul_ps(_mm512_maskz_loadu_ps(lanes, row + d), inverse);
      const __m512 clipped = _mm512_min_ps(_mm512_max_ps(value, least), most);
      const __m128i bytes = _mm512_cvtusepi32_epi8(
          _mm512_add_epi32(_mm512_cvtps_epi32(clipped), _mm512_set1_epi32(call.out_zero_point)));
      uint8_t* to = static_cast<uint8_t*>(call.out.data) + at + d;
      if (lanes == 0xffff)
        _mm_storeu_si128(reinterpret_cast<__m128i*>(to), bytes);
      else
        _mm_mask_storeu_epi8(to, lanes, bytes);
    }
  }
}

// The block's working memory, each part aligned to a cache line.
struct Memory {
  int32_t *scores, *weights;
  uint8_t* queries;
  float* out;
  Far* far;
  Memory(const Call& call, int64_t far_count, int64_t lines, int32_t* scratch) {
    const int64_t rows = most_tiles(call) * kTile + (far_count + 3) / 4 * 4;
    scores = scratch;
    weights = scores + rows * kLineInts;
    queries = reinterpret_cast<uint8_t*>(weights + rows * 4);
    out = reinterpret_cast<float*>(queries + lines * kLine);
    far = reinterpret_cast<Far*>(out + 4 * lines * kTile);
  }
};

// Appends one key's scores; the highest so far.
FASTREC_INLINE __m512i store_scores(int32_t** row, __mmask16 seen, __m512i score, __m512i highest) {
  score = _mm512_mask_mov_epi32(_mm512_set1_epi32(kUnseen), seen, score);
  _mm512_store_si512(*row, score);
  *row += kLineInts;
  return _mm512_max_epi32(highest, score);
}

FASTREC_VNNI void block_of_16(const Call& call, int64_t batch, int64_t head, const Head& packed,
                              float v_scale, int64_t i0, int64_t rows, const Sizes& sizes,
                              const Memory& memory) {
  const int64_t keys = call.keys(batch), lines = sizes.lines, tile_bytes = sizes.tile_bytes();
  const auto* q = head_of<uint8_t>(call.q, batch, head) + i0 * call.q.row_stride;
  pack_dims(q, call.q.row_stride, rows, call.dims, lines, call.q_u8 ? 0 : 0x80, memory.queries);

  const __m512i lane = _mm512_setr_epi32(0, 1, 2, 3, 4, 5, 6, 7, 8, 9, 10, 11, 12, 13, 14, 15);
  __m512i highest = _mm512_set1_epi32(kLeastMaximum);
  int32_t* row = memory.scores;
  const int64_t window = std::min(call.pattern.window, call.longest());
  const int64_t first_key = call.pattern.window_begin(i0);
  const int64_t end_key = call.pattern.window_end(i0 + rows - 1, keys);
  const int64_t first_tile = first_key / kTile;
  const int64_t end_tile = end_key > first_key ? (end_key + kTile - 1) / kTile : first_tile;
  // Query lane r sees key j where 0 <= j - (i0 + r) + window <= reach.
  const __m512i reach =
      _mm512_set1_epi32(static_cast<int32_t>(call.pattern.causal ? window : 2 * window));
  for (int64_t tile = first_tile; tile < end_tile; ++tile) {
    // The last one may be of a few keys: of whole fours.
    const int64_t there = std::min<int64_t>(kTile, keys - tile * kTile);
    const int64_t fours = (there + 3) / 4;
    kTileScores[fours - 1](memory.queries, packed.keys + tile * tile_bytes,
                           packed.bias + tile * kTile, lines, row);
    const int64_t before = i0 + rows - 1 - tile * kTile, behind = tile * kTile + there - 1 - i0;
    if (before <= window && behind <= (call.pattern.causal ? 0 : window)) {
      // All see all.
      highest = highest_of(row, there, highest);
      row += there * kLineInts;
      for (int64_t r = there; r < 4 * fours; ++r) highest = store_scores(&row, 0, highest, highest);
      continue;
    }
    for (int64_t j = tile * kTile; j < tile * kTile + 4 * fours; ++j) {
      const __m512i distance =
          _mm512_sub_epi32(_mm512_set1_epi32(static_cast<int32_t>(j - i0 + window)), lane);
      const __mmask16 seen = j < keys ? _mm512_cmple_epu32_mask(distance, reach) : 0;
      highest = store_scores(&row, seen, _mm512_load_si512(row), highest);
    }
  }
  const int64_t near_fours = (row - memory.scores) / (4 * kLineInts);
  int64_t far_count = 0;
  for (int64_t n = 0; n < call.pattern.far_count(head); ++n) {
    const int64_t first = i0 + call.pattern.far_shift(head, n);  // the key of lane 0
    if (first <= -kTile || first >= keys) continue;
    const int64_t tile = (first + kTile) / kTile - 1, shift = first - tile * kTile;
    const __m512i key = _mm512_add_epi32(lane, _mm512_set1_epi32(static_cast<int32_t>(first)));
    const __mmask16 seen =
        _mm512_cmplt_epu32_mask(key, _mm512_set1_epi32(static_cast<int32_t>(keys)));
    const __m512i score = far_scores(memory.queries, packed.keys + tile * tile_bytes, shift,
                                     tile_bytes, lines, _mm512_loadu_si512(packed.bias + first));
    highest = store_scores(&row, seen, score, highest);
    memory.far[far_count++] = {packed.values + tile * tile_bytes, shift};
  }
  for (; far_count % 4; ++far_count) {
    memory.far[far_count] = {packed.values, 0};
    highest = store_scores(&row, 0, highest, highest);
  }

  const int64_t scored = (row - memory.scores) / kLineInts;
  const __m512i sum = weights(memory.scores, scored, highest, call.exponent_scale, memory.weights);
  const __m512 factor = _mm512_maskz_div_ps(_mm512_test_epi32_mask(sum, sum),
                                            _mm512_set1_ps(v_scale), _mm512_cvtepi32_ps(sum));
  const __m512 factors[4] = {
      _mm512_shuffle_f32x4(factor, factor, 0x00), _mm512_shuffle_f32x4(factor, factor, 0x55),
      _mm512_shuffle_f32x4(factor, factor, 0xaa), _mm512_shuffle_f32x4(factor, factor, 0xff)};
  const __m512i across = across_lanes();
  const int64_t first_out = out_at(call, batch, head, i0);
  const bool direct = !call.out_u8 && call.dims % 4 == 0 && rows == kTile;
  float* const out = direct ? static_cast<float*>(call.out.data) + first_out : memory.out;
  const int64_t stride = direct ? call.out.row_stride : 4 * lines;
  for (int64_t line = 0; line < lines; line += 2) {
    Sums sums;
    weighted_sums(memory.weights, packed.values + first_tile * tile_bytes, near_fours, tile_bytes,
                  memory.far, far_count, line * kLine, &sums);
#pragma GCC unroll 2
    for (int i = 0; i < 2; ++i) {
      if (direct && 4 * (line + i) >= call.dims) break;
#pragma GCC unroll 4
      for (int m = 0; m < 4; ++m) {
        const __m512 value = _mm512_permutexvar_ps(
            across, _mm512_mul_ps(_mm512_cvtepi32_ps(sums.acc[i][m]), factors[m]));
        float* const to = out + 4 * m * stride + 4 * (line + i);
        _mm_storeu_ps(to, _mm512_castps512_ps128(value));
        _mm_storeu_ps(to + stride, _mm512_extractf32x4_ps(value, 1));
        _mm_storeu_ps(to + 2 * stride, _mm512_extractf32x4_ps(value, 2));
        _mm_storeu_ps(to + 3 * stride, _mm512_extractf32x4_ps(value, 3));
      }
    }
  }
  if (!direct) store_rows(call, first_out, rows, out, stride);
}

FASTREC_VNNI void block(const Call& call, int64_t batch, int64_t head, const Packed& packed,
                        int64_t begin, int64_t end, int32_t* scratch) {
  const Sizes sizes(call);
  const Memory memory(call, call.pattern.far_count(head), sizes.lines, scratch);
  const Head tiles(sizes, packed);
  for (int64_t i0 = begin; i0 < end; i0 += kTile)
    block_of_16(call, batch, head, tiles, packed.v_scale, i0, std::min<int64_t>(kTile, end - i0),
                sizes, memory);
}

}  // namespace

const Kernel kAvx512vnni = {Isa::avx512vnni, packed_bytes, scratch_ints, pack, block};

}  // namespace fastrec::window_sparse_attention_int8
#endif
