// The kernel that every vector ISA shares; an ISA file brings registers and the dot product.
//
// A file defines FASTREC_LINEAR_TARGET (its target attribute), includes this header, and
// instantiates make_kernel<Simd>() with a struct of static members (see any of the files). A strip
// is as many outputs as two weight registers hold: R rows of it keep 2R accumulators, and a kept
// group costs two weight loads, R broadcasts of 4 activations and 2R dot products.
#pragma once

#include <algorithm>
#include <cstring>
#include <type_traits>
#include <utility>

#include "gelu.h"
#include "sparse_int8_linear/sparse_int8_linear.h"

#define FASTREC_LINEAR_INLINE FASTREC_LINEAR_TARGET inline __attribute__((always_inline))

namespace fastrec::sparse_int8_linear {
namespace {

// Arguments of the micro-kernel; a struct, so that they arrive in one register.
template <class Simd>
struct Strip {
  const int8_t* values;        // [groups] of the panel's kept groups, 128 bytes apart
  const int32_t* group_index;  // [groups]
  int64_t groups;
  const typename Simd::Element* tile;  // [ceil(K / 32)][R][32]
  const int32_t* start;                // [kStripOutputs] what the sums begin with
  const int8_t* ahead;                 // weights to fetch meanwhile
  int64_t ahead_stride_bytes;          // of one line a group
  int32_t* acc;                        // [R][32] out
};

// Few rows have too few accumulators to hide the latency of the dot product: then consecutive
// groups go to sets of their own, which are added up in the end.
template <class Simd>
constexpr int sets_for(int rows) {
  return std::max(1, Simd::kSets / rows);
}
constexpr int kFewRows = 2;  // take a panel faster than it comes

template <int R, class Simd>
FASTREC_LINEAR_INLINE void multiply_group(const Strip<Simd>& strip, int64_t group,
                                          typename Simd::Int* first, typename Simd::Int* second) {
  const uint32_t k = static_cast<uint32_t>(strip.group_index[group]) * kGroupInputs;
  const auto* x = strip.tile + (R == 1 ? k : (k / kTileChunk) * (kTileChunk * R) + k % kTileChunk);
  typename Simd::Int w_first, w_second;
  Simd::load_weights(strip.values + group * kGroupBytes, w_first, w_second);
#pragma GCC unroll 16
  for (int r = 0; r < R; ++r) {
    const typename Simd::Int four = Simd::broadcast(x + r * kTileChunk);
    first[r] = Simd::dot(first[r], four, w_first);
    second[r] = Simd::dot(second[r], four, w_second);
  }
}

// gcc 12 spills the accumulators of a micro-kernel that is inlined into a larger function (three
// times slower): hence noinline, every loop over rows unrolled, and sums handed over through `acc`.
template <int R, class Simd>
FASTREC_LINEAR_TARGET __attribute__((noinline)) void accumulate(const Strip<Simd>& given) {
  constexpr int kSets = sets_for<Simd>(R);
  const Strip<Simd> strip = given;
  typename Simd::Int first[kSets][R], second[kSets][R];
  Simd::start(strip.start, first[0][0], second[0][0]);
#pragma GCC unroll 16
  for (int r = 1; r < R; ++r) first[0][r] = first[0][0], second[0][r] = second[0][0];
#pragma GCC unroll 4
  for (int s = 1; s < kSets; ++s)
#pragma GCC unroll 16
    for (int r = 0; r < R; ++r) first[s][r] = second[s][r] = Simd::zero();

  const int8_t* ahead = strip.ahead;
  int64_t g = 0;
  for (; g + kSets <= strip.groups; g += kSets) {
#pragma GCC unroll 4
    for (int s = 0; s < kSets; ++s) {
      // The hardware itself fetches what few rows stream through.
      if constexpr (R > kFewRows) Simd::prefetch(ahead);
      ahead += strip.ahead_stride_bytes;
      multiply_group<R, Simd>(strip, g + s, first[s], second[s]);
    }
  }
  if constexpr (kSets > 1) {
    for (; g < strip.groups; ++g) multiply_group<R, Simd>(strip, g, first[0], second[0]);
#pragma GCC unroll 4
    for (int s = 1; s < kSets; ++s)
#pragma GCC unroll 16
      for (int r = 0; r < R; ++r) {
        first[0][r] = Simd::add(first[0][r], first[s][r]);
        second[0][r] = Simd::add(second[0][r], second[s][r]);
      }
  }
#pragma GCC unroll 16
  for (int r = 0; r < R; ++r)
    Simd::store_sums(strip.acc + r * kPanelOutputs, first[0][r], second[0][r]);
}

template <class Simd>
using Accumulate = void (*)(const Strip<Simd>&);

template <class Simd, int... R>
constexpr Accumulate<Simd> accumulate_of(std::integer_sequence<int, R...>, int rows) {
  constexpr Accumulate<Simd> kByRows[] = {accumulate<R + 1, Simd>...};
  return kByRows[rows - 1];
}

template <class Simd>
struct Requantise {
  typename Simd::Float inverse_scale, high;
  typename Simd::Int zero_point;  // int16 lanes
};

template <class Simd>
FASTREC_LINEAR_INLINE Requantise<Simd> requantise_of(Quantisation q) {
  return {Simd::set(1.0f / q.scale), Simd::set(static_cast<float>(255 - q.zero_point)),
          Simd::set(q.zero_point * 0x10001)};
}

// Registers that hold 32 values: a panel's outputs, or a chunk's inputs.
template <class Simd>
constexpr int kParts = 32 / Simd::kLanes;

// 32 bytes or words. Bounded above before the conversion, which turns what exceeds int32 into its
// smallest number; below by saturation after the zero point is added. A NaN becomes 0.
template <class Simd, class To>
FASTREC_LINEAR_INLINE void quantise(const typename Simd::Float* value, const Requantise<Simd>& to,
                                    To* out) {
  typename Simd::Int rounded[kParts<Simd>];
#pragma GCC unroll 4
  for (int i = 0; i < kParts<Simd>; ++i)
    rounded[i] = Simd::round(Simd::min(to.high, Simd::mul(value[i], to.inverse_scale)));
  Simd::store_saturated(out, rounded, to.zero_point);
}

template <class Simd>
FASTREC_LINEAR_INLINE typename Simd::Float gelu(typename Simd::Float value) {
  using Float = typename Simd::Float;
  const Float round = Simd::set(kErfRound);
  const Float s =
      Simd::min(Simd::set(kErfLast), Simd::mul(Simd::abs(value), Simd::set(kErfPieces)));
  const Float piece = Simd::add(s, round);
  const Float t = Simd::sub(s, Simd::sub(piece, round));
  Float erf = Simd::pick(kErf[kErfDegree], piece);
#pragma GCC unroll 8
  for (int i = kErfDegree - 1; i >= 0; --i) erf = Simd::fmadd(erf, t, Simd::pick(kErf[i], piece));
  const Float half = Simd::mul(Simd::set(0.5f), value);
  return Simd::fmadd(Simd::abs(half), erf, half);
}

template <class Simd, Activation activation, Dtype y_dtype>
FASTREC_LINEAR_TARGET void epilogue(const Call& call, const Block& block, const int32_t* acc) {
  using Float = typename Simd::Float;
  constexpr bool kTiles = y_dtype == Dtype::u8_tiles;
  using Quantised = std::conditional_t<kTiles, typename Simd::Element, uint8_t>;
  constexpr int kBytes = kTiles || y_dtype == Dtype::u8 ? sizeof(Quantised)
                         : y_dtype == Dtype::bf16       ? 2
                                                        : 4;
  const Requantise<Simd> to = requantise_of<Simd>(call.y_quantisation);
  const Float zero = Simd::set(0.0f);
  const int64_t n0 = block.panel * kPanelOutputs;
  Float scale[kParts<Simd>], bias[kParts<Simd>];
#pragma GCC unroll 4
  for (int i = 0; i < kParts<Simd>; ++i) {
    scale[i] = Simd::load_f32(call.folded.scale + n0 + i * Simd::kLanes);
    bias[i] = Simd::load_f32(call.folded.bias + n0 + i * Simd::kLanes);
  }
  // A panel that reaches beyond N goes through memory: masked stores are many times slower than
  // plain ones on some CPUs (AMD Zen 4), and AVX2 has none for bytes.
  const int64_t left = std::min<int64_t>(call.weight.outputs - n0, kPanelOutputs);
  const int64_t row_bytes = (kTiles ? kPanelOutputs : call.weight.outputs) * kBytes;
  char part[kPanelOutputs * kBytes];
  char* y = static_cast<char*>(call.y);
  if constexpr (kTiles)
    y += (block.row0 * tile_row_elements(call.weight.outputs) + n0 * block.rows) * kBytes;
  else
    y += block.row0 * row_bytes + n0 * kBytes;
  const int32_t* const end = acc + block.rows * kPanelOutputs;
  for (; acc < end; acc += kPanelOutputs, y += row_bytes) {
    Float value[kParts<Simd>];
#pragma GCC unroll 4
    for (int i = 0; i < kParts<Simd>; ++i) {
      value[i] = Simd::to_float(Simd::load(acc + i * Simd::kLanes));
      value[i] = Simd::add(Simd::mul(value[i], scale[i]), bias[i]);
      if constexpr (activation == Activation::relu) value[i] = Simd::max(value[i], zero);
      if constexpr (activation == Activation::gelu) value[i] = gelu<Simd>(value[i]);
    }
    char* const where = kTiles || left == kPanelOutputs ? y : part;
    if constexpr (kTiles || y_dtype == Dtype::u8) {
      quantise<Simd>(value, to, reinterpret_cast<Quantised*>(where));
    } else {
#pragma GCC unroll 4
      for (int i = 0; i < kParts<Simd>; ++i) {
        if constexpr (y_dtype == Dtype::bf16)
          Simd::store_bf16(reinterpret_cast<uint16_t*>(where) + i * Simd::kLanes, value[i]);
        else
          Simd::store_f32(reinterpret_cast<float*>(where) + i * Simd::kLanes, value[i]);
      }
    }
    if (where == part) std::memcpy(y, part, static_cast<size_t>(left) * kBytes);
  }
}

template <class Simd, Activation activation>
FASTREC_LINEAR_INLINE void epilogue_to(const Call& call, const Block& block, const int32_t* acc) {
  switch (call.y_dtype) {
    case Dtype::u8:
      return epilogue<Simd, activation, Dtype::u8>(call, block, acc);
    case Dtype::bf16:
      return epilogue<Simd, activation, Dtype::bf16>(call, block, acc);
    case Dtype::f32:
      return epilogue<Simd, activation, Dtype::f32>(call, block, acc);
    case Dtype::u8_tiles:
      return epilogue<Simd, activation, Dtype::u8_tiles>(call, block, acc);
  }
}

template <class Simd>
FASTREC_LINEAR_TARGET void run_block(const Call& call, const Block& block) {
  alignas(64) int32_t acc[kMaxTileRows * kPanelOutputs];
  constexpr int kStrips = kPanelOutputs / Simd::kStripOutputs;
  const Weight& weight = call.weight;
  const int64_t first = weight.panel_start[block.panel];
  const int64_t groups = weight.panel_start[block.panel + 1] - first;
  const int8_t* values = weight.values + first * kGroupBytes;
  // While a panel is multiplied with all tiles, each tile fetches its share of the next panel: a
  // model's weights do not fit L2, and the first tile would wait for every line. (The last panel
  // runs past the end; a prefetch never faults.)
  const int64_t shares = block.tiles * kStrips;
  const int64_t stride = std::max<int64_t>(1, kGroupBytes / shares);
  const Accumulate<Simd> run =
      accumulate_of<Simd>(std::make_integer_sequence<int, Simd::kMaxRows>(), block.rows);
  for (int s = 0; s < kStrips; ++s) {
    const int64_t share = block.tile_index * kStrips + s;
    run({values + s * Simd::kStripOutputs * kGroupInputs, weight.group_index + first, groups,
         reinterpret_cast<const typename Simd::Element*>(block.tile),
         call.folded.start + block.panel * kPanelOutputs + s * Simd::kStripOutputs,
         values + groups * kGroupBytes + share * groups * stride, stride,
         acc + s * Simd::kStripOutputs});
  }
  switch (call.activation) {
    case Activation::none:
      return epilogue_to<Simd, Activation::none>(call, block, acc);
    case Activation::relu:
      return epilogue_to<Simd, Activation::relu>(call, block, acc);
    case Activation::gelu:
      return epilogue_to<Simd, Activation::gelu>(call, block, acc);
  }
}

// One row's chunk of 32 inputs into the tile.
template <class Simd, Dtype x_dtype>
FASTREC_LINEAR_INLINE void pack_chunk(const void* chunk, typename Simd::Element* tile,
                                      const Requantise<Simd>& to,
                                      typename Simd::NotNumbers& not_numbers) {
  if constexpr (x_dtype == Dtype::u8) {
    Simd::copy_chunk(static_cast<const uint8_t*>(chunk), tile);
  } else {
    typename Simd::Float x[kParts<Simd>];
#pragma GCC unroll 4
    for (int i = 0; i < kParts<Simd>; ++i) {
      if constexpr (x_dtype == Dtype::f32)
        x[i] = Simd::load_f32(static_cast<const float*>(chunk) + i * Simd::kLanes);
      else
        x[i] = Simd::load_bf16(static_cast<const uint16_t*>(chunk) + i * Simd::kLanes);
      Simd::note_not_numbers(not_numbers, x[i]);
    }
    quantise<Simd>(x, to, tile);
  }
}

template <class Simd, Dtype x_dtype>
FASTREC_LINEAR_INLINE bool pack(const Call& call, int64_t row0, int rows,
                                typename Simd::Element* tile) {
  constexpr int kBytes = x_dtype == Dtype::u8 ? 1 : x_dtype == Dtype::bf16 ? 2 : 4;
  const int64_t inputs = call.weight.inputs;
  const Requantise<Simd> to = requantise_of<Simd>(call.x_quantisation);
  typename Simd::NotNumbers not_numbers{};
  const char* x = static_cast<const char*>(call.x) + row0 * inputs * kBytes;
  int64_t k0 = 0;
  for (; k0 + kTileChunk <= inputs; k0 += kTileChunk)
    for (int r = 0; r < rows; ++r, tile += kTileChunk)
      pack_chunk<Simd, x_dtype>(x + (r * inputs + k0) * kBytes, tile, to, not_numbers);
  if (const int64_t left = inputs - k0; left > 0) {
    char part[kTileChunk * kBytes] = {};
    for (int r = 0; r < rows; ++r, tile += kTileChunk) {
      std::memcpy(part, x + (r * inputs + k0) * kBytes, static_cast<size_t>(left) * kBytes);
      pack_chunk<Simd, x_dtype>(part, tile, to, not_numbers);
      std::fill(tile + left, tile + kTileChunk, typename Simd::Element{0});
    }
  }
  return !Simd::any(not_numbers);
}

template <class Simd>
FASTREC_LINEAR_TARGET bool pack_tile(const Call& call, int64_t row0, int rows, void* tile) {
  auto* elements = static_cast<typename Simd::Element*>(tile);
  switch (call.x_dtype) {
    case Dtype::u8:
      return pack<Simd, Dtype::u8>(call, row0, rows, elements);
    case Dtype::bf16:
      return pack<Simd, Dtype::bf16>(call, row0, rows, elements);
    case Dtype::f32:
      return pack<Simd, Dtype::f32>(call, row0, rows, elements);
    case Dtype::u8_tiles:  // as they should be already
      break;
  }
  return false;
}

template <class Simd>
constexpr Kernel make_kernel() {
  return {Simd::kIsa, Simd::kMaxRows, sizeof(typename Simd::Element), pack_tile<Simd>,
          run_block<Simd>};
}

}  // namespace
}  // namespace fastrec::sparse_int8_linear
