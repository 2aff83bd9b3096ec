// The scalar twin of every vector kernel, bit for bit: plain loops, any machine.
#include <algorithm>
#include <bit>
#include <cmath>
#include <cstring>

#include "element.h"
#include "sparse_int8_linear/sparse_int8_linear.h"

namespace fastrec::sparse_int8_linear {
namespace {

uint8_t quantise(float value, float inverse_scale, int32_t zero_point) {
  const float low = static_cast<float>(-zero_point);
  const float high = static_cast<float>(255 - zero_point);
  // The order of the operands makes a NaN the lower bound, as maxps and minps do.
  const float clamped = std::min(high, std::max(low, value * inverse_scale));
  // nearbyint: round half to even in the default rounding mode, like cvtps2dq and torch.round.
  return static_cast<uint8_t>(static_cast<int32_t>(std::nearbyintf(clamped)) + zero_point);
}

float activate(float value, Activation activation) {
  if (activation == Activation::relu) return std::max(0.0f, value);
  if (activation == Activation::gelu) return gelu(value);
  return value;
}

float from_bf16(uint16_t half) { return std::bit_cast<float>(static_cast<uint32_t>(half) << 16); }

uint16_t to_bf16(float value) {
  const uint32_t bits = std::bit_cast<uint32_t>(value);
  return static_cast<uint16_t>((bits + 0x7fff + (bits >> 16 & 1)) >> 16);
}

bool pack_tile(const Call& call, int64_t row0, int rows, void* to) {
  uint8_t* tile = static_cast<uint8_t*>(to);
  const int64_t inputs = call.weight.inputs;
  const float inverse_scale = 1.0f / call.x_quantisation.scale;
  bool numbers = true;
  for (int64_t k0 = 0; k0 < inputs; k0 += kTileChunk) {
    const int count = static_cast<int>(std::min<int64_t>(kTileChunk, inputs - k0));
    for (int r = 0; r < rows; ++r, tile += kTileChunk) {
      const int64_t at = (row0 + r) * inputs + k0;
      if (call.x_dtype == Dtype::u8) {
        std::memcpy(tile, static_cast<const uint8_t*>(call.x) + at, count);
      } else {
        for (int k = 0; k < count; ++k) {
          const float x = call.x_dtype == Dtype::f32
                              ? static_cast<const float*>(call.x)[at + k]
                              : from_bf16(static_cast<const uint16_t*>(call.x)[at + k]);
          numbers &= !std::isnan(x);
          tile[k] = quantise(x, inverse_scale, call.x_quantisation.zero_point);
        }
      }
      std::memset(tile + count, 0, kTileChunk - count);
    }
  }
  return numbers;
}

void block(const Call& call, const Block& block) {
  const Folded& folded = call.folded;
  const Weight& weight = call.weight;
  const int64_t n0 = block.panel * kPanelOutputs;
  uint32_t acc[kMaxTileRows][kPanelOutputs];
  for (int r = 0; r < block.rows; ++r)
    std::copy(folded.start + n0, folded.start + n0 + kPanelOutputs, acc[r]);
  for (int32_t g = weight.panel_start[block.panel]; g < weight.panel_start[block.panel + 1]; ++g) {
    const int8_t* w = weight.values + static_cast<int64_t>(g) * kGroupBytes;
    const int64_t k = static_cast<int64_t>(weight.group_index[g]) * kGroupInputs;
    const uint8_t* x = static_cast<const uint8_t*>(block.tile) +
                       k / kTileChunk * kTileChunk * block.rows + k % kTileChunk;
    for (int r = 0; r < block.rows; ++r, x += kTileChunk)
      for (int n = 0; n < kPanelOutputs; ++n)
        for (int i = 0; i < kGroupInputs; ++i)
          acc[r][n] += static_cast<uint32_t>(x[i] * w[n * kGroupInputs + i]);
  }
  const int count = static_cast<int>(std::min<int64_t>(kPanelOutputs, weight.outputs - n0));
  const float inverse_scale = 1.0f / call.y_quantisation.scale;
  const bool tiles = call.y_dtype == Dtype::u8_tiles;
  for (int r = 0; r < block.rows; ++r) {
    const int64_t at =
        tiles ? block.row0 * tile_row_elements(weight.outputs) + n0 * block.rows + r * kTileChunk
              : (block.row0 + r) * weight.outputs + n0;
    for (int n = 0; n < count; ++n) {
      const int32_t exact = static_cast<int32_t>(acc[r][n]);
      float value = static_cast<float>(exact) * folded.scale[n0 + n] + folded.bias[n0 + n];
      value = activate(value, call.activation);
      if (call.y_dtype == Dtype::f32)
        static_cast<float*>(call.y)[at + n] = value;
      else if (call.y_dtype == Dtype::bf16)
        static_cast<uint16_t*>(call.y)[at + n] = to_bf16(value);
      else
        static_cast<uint8_t*>(call.y)[at + n] =
            quantise(value, inverse_scale, call.y_quantisation.zero_point);
    }
  }
}

}  // namespace

const Kernel kScalar = {Isa::scalar, kMaxTileRows, 1, pack_tile, block};

}  // namespace fastrec::sparse_int8_linear
