// window_sparse_attention_int8: attention over a window and far positions, on 8-bit integers.
//
// q u8 or s8 [B, H, L, D], k u8 or s8, v u8, s8 or f32 [B, H, key rows, D], with strides in
// elements, the D of a row contiguous; out f32 or u8, as q. k and v in u8 are around 128: an s8
// plus that. Or sequences behind each other, [T, H, D], that start and end where cu_seqlens says.
// For query i and the keys j that AttentionPattern shows it:
//
//   s_j = sum_d (q[i, d] - q_zero_point) * k[j, d]              exact int32
//   t_j = max(f32(s_j - max_j s_j) * exponent_scale, -16)       the difference is exact, <= 2^24
//   n = rint(t_j), f = t_j - n
//   p_j = rint(2^n * (255 + f * (c1 + f * (c2 + f * c3))))      u8, 255 for the largest score
//   a_d = sum_j p_j * v[j, d]                                   exact int32
//   out = f32(a_d) * (v_scale / f32(sum_j p_j))                 0 where no key is seen
//
// A float v becomes s8 first, by one scale for each (batch, head), its largest valid |v| / 127:
// rint(v * (127 / largest)). u8 out: rint(clip(out * (1 / out_scale))) + out_zero_point. Every
// float step is one IEEE fp32 operation, ties to even, never fused: all instruction sets and the
// torch reference agree to the last bit. The cubic is within 1.1e-4 of 2^f, a fortieth of the
// step of p.
//
// No overflow: |s| <= 256 * 255 * 128 < 2^23.0 and at most kMaxKeys keys a query (|a| < 2^31).
// Keys at or beyond lengths[b] are never read. Nothing outside the given rows is read. Scratch is
// O(B H L D) bytes for the repacked k and v, and 64 bytes a key of the window for each thread.
#pragma once

#include <cstdint>

#include "attention_pattern.h"
#include "isa.h"

namespace fastrec::window_sparse_attention_int8 {

inline constexpr int64_t kMaxKeys = 65'536;
inline constexpr int64_t kMaxDims = 256;
inline constexpr float kTop = 255.0f;  // p of the largest score
inline constexpr float kLowest = -16.0f;
inline constexpr float kC1 = 176.78713989257812f, kC2 = 61.7637939453125f,
                       kC3 = 14.027276992797852f;
// Scores of keys that are not seen, and the least maximum: their difference gives p = 0.
inline constexpr int32_t kUnseen = -(1 << 30), kLeastMaximum = -(1 << 29);

struct Rows {
  const void* data;
  int64_t batch_stride, head_stride, row_stride;
};

struct OutRows {
  void* data;
  int64_t batch_stride, head_stride, row_stride;
};

struct Call {
  Rows q, k, v;
  bool q_u8, v_f32, out_u8;
  int32_t q_zero_point;  // 0 for s8
  float exponent_scale;  // q_scale * k_scale * scale * log2(e), >= 0
  const float* v_scale;  // [B, H], or null: v is f32, or v_scale_of_all holds
  OutRows out;
  float out_scale;
  int32_t out_zero_point;
  const int64_t* lengths;     // [B], each 0..key rows, or null: all of them
  const int64_t* cu_seqlens;  // [B + 1], rising from 0 to T, or null; length is T then
  AttentionPattern pattern;
  int64_t batch, heads, length, dims;
  int64_t key_rows;  // length, where there are cu_seqlens
  bool k_u8 = false, v_u8 = false;
  float v_scale_of_all = 0.0f;

  int64_t keys(int64_t batch_index) const { return lengths ? lengths[batch_index] : key_rows; }
  int64_t longest() const { return length > key_rows ? length : key_rows; }
};

// Bytes that packing one head of one batch takes.
struct Packed {
  uint8_t* data;
  float v_scale;
};

struct Kernel {
  Isa isa;
  int64_t (*packed_bytes)(const Call& call);
  // int32s of scratch that one thread needs in block().
  int64_t (*scratch_ints)(const Call& call, int64_t far);
  // False where a valid v is not finite.
  bool (*pack)(const Call& call, int64_t batch, int64_t head, Packed* packed);
  // Query rows [begin, end) of one head; begin is a multiple of kBlockRows.
  void (*block)(const Call& call, int64_t batch, int64_t head, const Packed& packed, int64_t begin,
                int64_t end, int32_t* scratch);
};

inline constexpr int64_t kBlockRows = 16;

extern const Kernel kScalar;
extern const Kernel kAvx2;
extern const Kernel kAvx512vnni;

const Kernel& select();

inline constexpr int64_t kDone = -1, kNotFinite = -2, kBadScale = -3;
// kDone; kNotFinite: a valid v is NaN or infinite; kBadScale: a v_scale is negative, NaN or
// infinite; or the first entry of lengths or cu_seqlens that is out of order.
int64_t run(const Call& call);

}  // namespace fastrec::window_sparse_attention_int8
