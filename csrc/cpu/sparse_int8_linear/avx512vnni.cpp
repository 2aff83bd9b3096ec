// AVX-512 VNNI: a block of R rows x 32 outputs keeps 2R accumulators in registers; a kept group
// costs two weight loads, R broadcasts of 4 activations and 2R vpdpbusd.
#include "sparse_int8_linear/sparse_int8_linear.h"

#if defined(__x86_64__)
#include <immintrin.h>

#include <algorithm>
#include <cstring>

#include "sparse_int8_linear/epilogue.h"

#define FASTREC_AVX512VNNI __attribute__((target(FASTREC_TARGET_avx512vnni)))
#define FASTREC_INLINE FASTREC_AVX512VNNI inline __attribute__((always_inline))

namespace fastrec::sparse_int8_linear {
namespace {

constexpr int kLanes = 16;

// gcc 12 spills the accumulators of a micro-kernel that is inlined into a larger function (three
// times slower): hence noinline, every loop over rows unrolled, and sums handed over through `acc`.
template <int R>
FASTREC_AVX512VNNI __attribute__((noinline)) void accumulate(
    const int8_t* values,        // [groups][128] kept groups of this panel
    const int32_t* group_index,  // [groups]
    int64_t groups,
    const uint8_t* tile,         // [ceil(K / 32)][R][32]
    const int8_t* ahead,         // weights to fetch into L2 meanwhile
    int64_t ahead_stride_bytes,  // of one line a group
    int32_t* acc)                // [R][32] out
{
  __m512i low_i32x16[R], high_i32x16[R];
#pragma GCC unroll 16
  for (int r = 0; r < R; ++r) low_i32x16[r] = high_i32x16[r] = _mm512_setzero_si512();

  for (int64_t g = 0; g < groups; ++g, values += kGroupBytes) {
    const uint32_t k = static_cast<uint32_t>(group_index[g]) * kGroupInputs;
    const uint8_t* x = tile + (k / kTileChunk) * (kTileChunk * R) + k % kTileChunk;
    _mm_prefetch(reinterpret_cast<const char*>(ahead + g * ahead_stride_bytes), _MM_HINT_T1);
    const __m512i low_i8x64 = _mm512_loadu_si512(values);
    const __m512i high_i8x64 = _mm512_loadu_si512(values + 64);
#pragma GCC unroll 16
    for (int r = 0; r < R; ++r) {
      int32_t four;
      std::memcpy(&four, x + r * kTileChunk, sizeof(four));
      const __m512i x_u8x64 = _mm512_set1_epi32(four);
      low_i32x16[r] = _mm512_dpbusd_epi32(low_i32x16[r], x_u8x64, low_i8x64);
      high_i32x16[r] = _mm512_dpbusd_epi32(high_i32x16[r], x_u8x64, high_i8x64);
    }
  }
#pragma GCC unroll 16
  for (int r = 0; r < R; ++r) {
    _mm512_store_si512(acc + r * kPanelOutputs, low_i32x16[r]);
    _mm512_store_si512(acc + r * kPanelOutputs + kLanes, high_i32x16[r]);
  }
}

using Accumulate = void (*)(const int8_t*, const int32_t*, int64_t, const uint8_t*, const int8_t*,
                            int64_t, int32_t*);
constexpr Accumulate kAccumulate[kMaxTileRows] = {
    accumulate<1>, accumulate<2>, accumulate<3>, accumulate<4>,  accumulate<5>,  accumulate<6>,
    accumulate<7>, accumulate<8>, accumulate<9>, accumulate<10>, accumulate<11>, accumulate<12>};

struct Requantise {
  __m512 inverse_scale, low, high;
  __m512i zero_point;
};

FASTREC_INLINE Requantise requantise_of(Quantisation q) {
  return {_mm512_set1_ps(1.0f / q.scale), _mm512_set1_ps(static_cast<float>(-q.zero_point)),
          _mm512_set1_ps(static_cast<float>(255 - q.zero_point)), _mm512_set1_epi32(q.zero_point)};
}

FASTREC_INLINE __m128i quantise(__m512 value, const Requantise& to) {
  __m512 scaled = _mm512_mul_ps(value, to.inverse_scale);
  scaled = _mm512_min_ps(_mm512_max_ps(scaled, to.low), to.high);
  return _mm512_cvtepi32_epi8(_mm512_add_epi32(_mm512_cvtps_epi32(scaled), to.zero_point));
}

FASTREC_INLINE __m512 gelu(__m512 value) {
  const __m512 limit = _mm512_set1_ps(kErfLimit), one = _mm512_set1_ps(1.0f);
  __m512 y = _mm512_mul_ps(value, _mm512_set1_ps(kSqrtHalf));
  y = _mm512_min_ps(_mm512_max_ps(y, _mm512_sub_ps(_mm512_setzero_ps(), limit)), limit);
  const __m512 u = _mm512_mul_ps(y, y);
  __m512 p = _mm512_set1_ps(kErfP[5]), q = _mm512_set1_ps(kErfQ[5]);
#pragma GCC unroll 8
  for (int i = 4; i >= 0; --i) {
    p = _mm512_fmadd_ps(p, u, _mm512_set1_ps(kErfP[i]));
    q = _mm512_fmadd_ps(q, u, _mm512_set1_ps(kErfQ[i]));
  }
  __m512 erf = _mm512_div_ps(_mm512_mul_ps(y, p), q);
  erf = _mm512_min_ps(_mm512_max_ps(erf, _mm512_sub_ps(_mm512_setzero_ps(), one)), one);
  const __m512 half = _mm512_mul_ps(_mm512_set1_ps(0.5f), value);
  return _mm512_fmadd_ps(half, erf, half);
}

// Masked stores are many times slower than plain ones on some CPUs (AMD Zen 4).
FASTREC_INLINE void store(float* to, __mmask16 lanes, __m512 value) {
  if (lanes == 0xffff)
    _mm512_storeu_ps(to, value);
  else
    _mm512_mask_storeu_ps(to, lanes, value);
}

FASTREC_INLINE void store(uint8_t* to, __mmask16 lanes, __m128i value) {
  if (lanes == 0xffff)
    _mm_storeu_si128(reinterpret_cast<__m128i*>(to), value);
  else
    _mm_mask_storeu_epi8(to, lanes, value);
}

template <Activation activation>
FASTREC_INLINE void epilogue(const Call& call, const Block& block, const int32_t* acc) {
  const Weight& weight = call.weight;
  const Requantise to = requantise_of(call.y_quantisation);
  const __m512i x_zero_point = _mm512_set1_epi32(call.x_quantisation.zero_point);
  const __m512 x_scale = _mm512_set1_ps(call.x_quantisation.scale);
  for (int half = 0; half < kPanelOutputs; half += kLanes) {
    const int64_t n0 = block.panel * kPanelOutputs + half;
    const int64_t left = weight.outputs - n0;
    if (left <= 0) return;
    const __mmask16 lanes = left >= kLanes ? 0xffff : static_cast<__mmask16>((1u << left) - 1);
    // [16] per output
    const __m512i sum = _mm512_maskz_loadu_epi32(lanes, weight.sum + n0);
    const __m512i correction = _mm512_mullo_epi32(x_zero_point, sum);
    const __m512 scale = _mm512_mul_ps(x_scale, _mm512_maskz_loadu_ps(lanes, weight.scale + n0));
    const __m512 bias =
        weight.bias ? _mm512_maskz_loadu_ps(lanes, weight.bias + n0) : _mm512_setzero_ps();
    for (int r = 0; r < block.rows; ++r) {
      const __m512i raw = _mm512_load_si512(acc + r * kPanelOutputs + half);
      const __m512i exact = _mm512_sub_epi32(raw, correction);
      __m512 value = _mm512_mul_ps(_mm512_cvtepi32_ps(exact), scale);
      if (weight.bias) value = _mm512_add_ps(value, bias);
      if constexpr (activation == Activation::relu)
        value = _mm512_max_ps(value, _mm512_setzero_ps());
      if constexpr (activation == Activation::gelu) value = gelu(value);
      const int64_t at = (block.row0 + r) * weight.outputs + n0;
      if (call.y_dtype == Dtype::f32)
        store(static_cast<float*>(call.y) + at, lanes, value);
      else
        store(static_cast<uint8_t*>(call.y) + at, lanes, quantise(value, to));
    }
  }
}

FASTREC_AVX512VNNI void block(const Call& call, const Block& block) {
  alignas(64) int32_t acc[kMaxTileRows * kPanelOutputs];
  const Weight& weight = call.weight;
  const int64_t first = weight.panel_start[block.panel];
  const int64_t groups = weight.panel_start[block.panel + 1] - first;
  const int8_t* values = weight.values + first * kGroupBytes;
  // While a panel is multiplied with all tiles, each tile fetches its share of the next panel: a
  // model's weights do not fit L2, and the first tile would wait for every line. (The last panel
  // runs past the end; a prefetch never faults.)
  const int64_t share_bytes = groups * kGroupBytes / block.tiles;
  const int8_t* ahead = values + groups * kGroupBytes + block.tile_index * share_bytes;
  kAccumulate[block.rows - 1](values, weight.group_index + first, groups, block.tile, ahead,
                              kGroupBytes / block.tiles, acc);
  switch (call.activation) {
    case Activation::none:
      return epilogue<Activation::none>(call, block, acc);
    case Activation::relu:
      return epilogue<Activation::relu>(call, block, acc);
    case Activation::gelu:
      return epilogue<Activation::gelu>(call, block, acc);
  }
}

// One row's chunk of 32 inputs (fewer at the end of K): u8 out.
FASTREC_INLINE __m256i load_chunk(const Call& call, int64_t at, __mmask32 lanes,
                                  const Requantise& to, __mmask16& not_numbers) {
  if (call.x_dtype == Dtype::u8)
    return _mm256_maskz_loadu_epi8(lanes, static_cast<const uint8_t*>(call.x) + at);
  const float* x = static_cast<const float*>(call.x) + at;
  const __m512 low = _mm512_maskz_loadu_ps(static_cast<__mmask16>(lanes), x);
  const __m512 high = _mm512_maskz_loadu_ps(static_cast<__mmask16>(lanes >> kLanes), x + kLanes);
  not_numbers |= _mm512_cmp_ps_mask(low, high, _CMP_UNORD_Q);
  const __m256i both = _mm256_set_m128i(quantise(high, to), quantise(low, to));
  return _mm256_maskz_mov_epi8(lanes, both);
}

FASTREC_AVX512VNNI bool pack_tile(const Call& call, int64_t row0, int rows, uint8_t* tile) {
  const int64_t inputs = call.weight.inputs;
  const Requantise to = requantise_of(call.x_quantisation);
  __mmask16 not_numbers = 0;
  for (int64_t k0 = 0; k0 < inputs; k0 += kTileChunk) {
    const int64_t left = inputs - k0;
    const __mmask32 lanes = left >= kTileChunk ? ~0u : (1u << left) - 1;
    for (int r = 0; r < rows; ++r, tile += kTileChunk)
      _mm256_storeu_si256(reinterpret_cast<__m256i*>(tile),
                          load_chunk(call, (row0 + r) * inputs + k0, lanes, to, not_numbers));
  }
  return not_numbers == 0;
}

}  // namespace

const Kernel kAvx512vnni = {Isa::avx512vnni, pack_tile, block};

}  // namespace fastrec::sparse_int8_linear
#endif
