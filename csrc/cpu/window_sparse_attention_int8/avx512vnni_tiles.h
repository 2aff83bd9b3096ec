// How the AVX-512 VNNI kernel packs a head, and the byte and lane shuffles that it packs with.
//
// Tiles of 16 positions with one empty tile before and behind:
//   keys    [tile][D / 4][16 positions][4 dims]    a key's 4 dims are broadcast, or 16 loaded
//   values  [tile][D / 4][4 dims][16 positions]
//   bias    [tile][16 positions]                   int32: -zero point * sum of the key
#pragma once

#include <immintrin.h>

#include "window_sparse_attention_int8/rows.h"

#define FASTREC_VNNI __attribute__((target(FASTREC_TARGET_avx512vnni)))
#define FASTREC_INLINE FASTREC_VNNI inline __attribute__((always_inline))
#define FASTREC_NOINLINE FASTREC_VNNI __attribute__((noinline))

namespace fastrec::window_sparse_attention_int8 {
namespace {

constexpr int kTile = 16;      // positions a tile, queries a block
constexpr int kLine = 64;      // bytes of a tile's row: 4 dims of 16 positions
constexpr int kLineInts = 16;  // the same in int32s

struct Sizes {
  int64_t lines;  // of 4 dims; even, so that values go in pairs
  int64_t tiles;  // the two empty ones included
  explicit Sizes(const Call& call)
      : lines((call.dims + 7) / 8 * 2), tiles((call.key_rows + kTile - 1) / kTile + 2) {}
  int64_t tile_bytes() const { return lines * kLine; }
};

struct Head {
  const uint8_t *keys, *values;  // of position 0
  const int32_t* bias;
  Head(const Sizes& sizes, const Packed& packed)
      : keys(packed.data + sizes.tile_bytes()),
        values(keys + sizes.tiles * sizes.tile_bytes()),
        bias(reinterpret_cast<const int32_t*>(packed.data + 2 * sizes.tiles * sizes.tile_bytes()) +
             kTile) {}
};

int64_t packed_bytes(const Call& call) {
  const Sizes sizes(call);
  return sizes.tiles * (2 * sizes.tile_bytes() + kLine);
}

FASTREC_INLINE __mmask64 first_bytes(int64_t count) {
  return count >= 64 ? ~0ull : (1ull << count) - 1;
}

// 16 rows of 16 int32s, in place.
FASTREC_INLINE void transpose(__m512i* r) {
  __m512i t[16];
#pragma GCC unroll 8
  for (int i = 0; i < 16; i += 2) {
    t[i] = _mm512_unpacklo_epi32(r[i], r[i + 1]);
    t[i + 1] = _mm512_unpackhi_epi32(r[i], r[i + 1]);
  }
#pragma GCC unroll 4
  for (int i = 0; i < 16; i += 4) {
    r[i] = _mm512_unpacklo_epi64(t[i], t[i + 2]);
    r[i + 1] = _mm512_unpackhi_epi64(t[i], t[i + 2]);
    r[i + 2] = _mm512_unpacklo_epi64(t[i + 1], t[i + 3]);
    r[i + 3] = _mm512_unpackhi_epi64(t[i + 1], t[i + 3]);
  }
#pragma GCC unroll 4
  for (int i = 0; i < 4; ++i) {
    t[i] = _mm512_shuffle_i32x4(r[i], r[i + 4], 0x88);
    t[i + 4] = _mm512_shuffle_i32x4(r[i], r[i + 4], 0xdd);
    t[i + 8] = _mm512_shuffle_i32x4(r[i + 8], r[i + 12], 0x88);
    t[i + 12] = _mm512_shuffle_i32x4(r[i + 8], r[i + 12], 0xdd);
  }
#pragma GCC unroll 4
  for (int i = 0; i < 4; ++i) {
    r[i] = _mm512_shuffle_i32x4(t[i], t[i + 8], 0x88);
    r[i + 4] = _mm512_shuffle_i32x4(t[i + 4], t[i + 12], 0x88);
    r[i + 8] = _mm512_shuffle_i32x4(t[i], t[i + 8], 0xdd);
    r[i + 12] = _mm512_shuffle_i32x4(t[i + 4], t[i + 12], 0xdd);
  }
}

// 16 rows of D bytes -> [lines][16 rows][4], each byte xor flip; 0 for rows and dims that are not
// there.
FASTREC_NOINLINE void pack_dims(const uint8_t* from, int64_t stride, int64_t rows, int64_t dims,
                                int64_t lines, uint8_t flip, uint8_t* to) {
  const __m512i flips = _mm512_set1_epi8(static_cast<char>(flip));
  for (int64_t line = 0; line < lines; line += kTile) {
    const __mmask64 bytes = first_bytes(std::max<int64_t>(0, dims - 4 * line));
    const __m512i flip_of_row = _mm512_maskz_mov_epi8(bytes, flips);
    __m512i r[16];
#pragma GCC unroll 16
    for (int i = 0; i < 16; ++i)
      r[i] = i < rows ? _mm512_xor_si512(flip_of_row, _mm512_maskz_loadu_epi8(
                                                          bytes, from + i * stride + 4 * line))
                      : _mm512_setzero_si512();
    transpose(r);
    const int64_t count = std::min<int64_t>(kTile, lines - line);
#pragma GCC unroll 16
    for (int i = 0; i < 16; ++i)
      if (i < count) _mm512_store_si512(to + (line + i) * kLine, r[i]);
  }
}

// Lane l of z[m] holds 16 bytes of row 4 l + m -> lane l of four[i]: bytes 4 i .. 4 i + 3, each of
// the lane's four rows in turn.
FASTREC_INLINE void interleave(const __m512i (&z)[4], __m512i (&four)[4]) {
  const __m512i low01 = _mm512_unpacklo_epi8(z[0], z[1]), high01 = _mm512_unpackhi_epi8(z[0], z[1]),
                low23 = _mm512_unpacklo_epi8(z[2], z[3]), high23 = _mm512_unpackhi_epi8(z[2], z[3]);
  four[0] = _mm512_unpacklo_epi16(low01, low23);
  four[1] = _mm512_unpackhi_epi16(low01, low23);
  four[2] = _mm512_unpacklo_epi16(high01, high23);
  four[3] = _mm512_unpackhi_epi16(high01, high23);
}

// Element m of lane l <-> element l of lane m.
FASTREC_INLINE __m512i across_lanes() {
  return _mm512_setr_epi32(0, 4, 8, 12, 1, 5, 9, 13, 2, 6, 10, 14, 3, 7, 11, 15);
}

// Row p of 16 s8 dims.
template <bool v_f32>
FASTREC_INLINE __m128i value_row(const void* row, int64_t dims, __m512 inverse, __m128i flip) {
  if constexpr (v_f32) {
    const __mmask16 lanes = static_cast<__mmask16>(first_bytes(dims));
    const __m512 v = _mm512_maskz_loadu_ps(lanes, row);
    return _mm512_cvtsepi32_epi8(_mm512_cvtps_epi32(_mm512_mul_ps(v, inverse)));
  } else {
    const auto bytes = static_cast<__mmask16>(first_bytes(dims));
    return _mm_maskz_mov_epi8(bytes, _mm_xor_si128(_mm_maskz_loadu_epi8(bytes, row), flip));
  }
}

// 16 rows of D values -> [lines][4 dims][16 rows].
template <bool v_f32>
FASTREC_NOINLINE void pack_values(const uint8_t* from, int64_t stride_bytes, int64_t rows,
                                  int64_t dims, int64_t lines, float inverse, uint8_t flip,
                                  uint8_t* to) {
  constexpr int kBytes = v_f32 ? 4 : 1;
  const __m512 inverses = _mm512_set1_ps(inverse);
  const __m128i flips = _mm_set1_epi8(static_cast<char>(flip));
  const __m512i across = across_lanes();
  for (int64_t line = 0; line < lines; line += 4) {
    const int64_t left = dims - 4 * line;
    __m512i z[4];
    // Lane l of z[m] is row 4 l + m.
#pragma GCC unroll 4
    for (int m = 0; m < 4; ++m) {
      __m128i row[4];
#pragma GCC unroll 4
      for (int l = 0; l < 4; ++l) {
        const int64_t p = 4 * l + m;
        row[l] = p < rows && left > 0
                     ? value_row<v_f32>(from + p * stride_bytes + 4 * line * kBytes, left, inverses,
                                        flips)
                     : _mm_setzero_si128();
      }
      z[m] = _mm512_inserti32x4(_mm512_castsi128_si512(row[0]), row[1], 1);
      z[m] = _mm512_inserti32x4(z[m], row[2], 2);
      z[m] = _mm512_inserti32x4(z[m], row[3], 3);
    }
    __m512i four[4];
    interleave(z, four);
#pragma GCC unroll 4
    for (int i = 0; i < 4; ++i)
      if (line + i < lines)
        _mm512_store_si512(to + (line + i) * kLine, _mm512_permutexvar_epi32(across, four[i]));
  }
}

int32_t zero_point(const Call& call) { return call.q_u8 ? call.q_zero_point : 128; }

FASTREC_VNNI void pack_bias(const uint8_t* keys, int64_t lines, int32_t zero, int32_t* to) {
  __m512i sum = _mm512_setzero_si512();
  for (int64_t line = 0; line < lines; ++line)
    sum = _mm512_dpbusd_epi32(sum, _mm512_set1_epi8(1), _mm512_load_si512(keys + line * kLine));
  _mm512_store_si512(to, _mm512_mullo_epi32(sum, _mm512_set1_epi32(-zero)));
}

FASTREC_VNNI bool pack(const Call& call, int64_t batch, int64_t head, Packed* packed) {
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
  const int64_t v_bytes = call.v_f32 ? 4 : 1;
  const auto* k = head_of<uint8_t>(call.k, batch, head);
  const auto* v = static_cast<const uint8_t*>(call.v.data) +
                  (batch * call.v.batch_stride + head * call.v.head_stride) * v_bytes;
  uint8_t* keys = packed->data;
  uint8_t* values = keys + sizes.tiles * sizes.tile_bytes();
  auto* bias = reinterpret_cast<int32_t*>(values + sizes.tiles * sizes.tile_bytes());
  const auto pack_v = call.v_f32 ? pack_values<true> : pack_values<false>;
  for (int64_t tile = 0; tile < sizes.tiles; ++tile) {
    const int64_t first = (tile - 1) * kTile;
    const int64_t rows = first < 0 ? 0 : std::clamp<int64_t>(call.keys(batch) - first, 0, kTile);
    const int64_t at = rows ? first : 0;
    pack_dims(k + at * call.k.row_stride, call.k.row_stride, rows, call.dims, sizes.lines,
              flip_of(call.k_u8), keys);
    pack_v(v + at * call.v.row_stride * v_bytes, call.v.row_stride * v_bytes, rows, call.dims,
           sizes.lines, inverse, flip_of(call.v_u8), values);
    pack_bias(keys, sizes.lines, zero_point(call), bias);
    keys += sizes.tile_bytes();
    values += sizes.tile_bytes();
    bias += kLineInts;
  }
  return true;
}

}  // namespace
}  // namespace fastrec::window_sparse_attention_int8
