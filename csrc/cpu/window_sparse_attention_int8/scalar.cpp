// Plain loops, any machine: the readable form of every vector kernel.
#include <algorithm>
#include <cmath>

#include "window_sparse_attention_int8/rows.h"

namespace fastrec::window_sparse_attention_int8 {
namespace {

// The head's v as s8 rows.
int64_t packed_bytes(const Call& call) { return call.key_rows * call.dims; }

int64_t most_keys(const Call& call, int64_t far) {
  return std::min(call.key_rows, 2 * call.pattern.window + 1) + far;
}

int64_t scratch_ints(const Call& call, int64_t far) { return 2 * most_keys(call, far) + call.dims; }

bool pack(const Call& call, int64_t batch, int64_t head, Packed* packed) {
  auto* to = reinterpret_cast<int8_t*>(packed->data);
  if (!call.v_f32) {
    packed->v_scale = value_scale(call, batch, head);
    const auto* v = head_of<uint8_t>(call.v, batch, head);
    for (int64_t j = 0; j < call.keys(batch); ++j)
      for (int64_t d = 0; d < call.dims; ++d)
        to[j * call.dims + d] =
            static_cast<int8_t>(v[j * call.v.row_stride + d] ^ flip_of(call.v_u8));
    return true;
  }
  const float largest = largest_value(call, batch, head);
  if (largest < 0) return false;
  packed->v_scale = largest / 127.0f;
  const float inverse = inverse_scale(largest);
  const float* v = head_of<float>(call.v, batch, head);
  for (int64_t j = 0; j < call.keys(batch); ++j)
    for (int64_t d = 0; d < call.dims; ++d)
      to[j * call.dims + d] =
          static_cast<int8_t>(std::nearbyint(v[j * call.v.row_stride + d] * inverse));
  return true;
}

int32_t weight(int32_t difference, float exponent_scale) {
  const float t = std::max(static_cast<float>(difference) * exponent_scale, kLowest);
  const float n = std::nearbyint(t), f = t - n;
  const float p = kTop + f * (kC1 + f * (kC2 + f * kC3));
  return static_cast<int32_t>(std::nearbyint(std::ldexp(p, static_cast<int>(n))));
}

int32_t score(const Call& call, int64_t batch, int64_t head, int64_t i, int64_t j) {
  const auto* k = head_of<uint8_t>(call.k, batch, head) + j * call.k.row_stride;
  const int64_t q_at = i * call.q.row_stride;
  const uint8_t* q_u8 = head_of<uint8_t>(call.q, batch, head) + q_at;
  const int8_t* q_s8 = head_of<int8_t>(call.q, batch, head) + q_at;
  int32_t sum = 0;
  for (int64_t d = 0; d < call.dims; ++d)
    sum += ((call.q_u8 ? q_u8[d] : q_s8[d]) - call.q_zero_point) *
           static_cast<int8_t>(k[d] ^ flip_of(call.k_u8));
  return sum;
}

void block(const Call& call, int64_t batch, int64_t head, const Packed& packed, int64_t begin,
           int64_t end, int32_t* scratch) {
  const int64_t keys = call.keys(batch), far = call.pattern.far_count(head);
  const auto* v = reinterpret_cast<const int8_t*>(packed.data);
  int32_t* const scores = scratch;
  int32_t* const key = scores + most_keys(call, far);
  int32_t* const sums = key + most_keys(call, far);
  for (int64_t i = begin; i < end; ++i) {
    int64_t seen = 0;
    int32_t highest = kLeastMaximum;
    const auto see = [&](int64_t j) {
      scores[seen] = score(call, batch, head, i, j);
      highest = std::max(highest, scores[seen]);
      key[seen++] = static_cast<int32_t>(j);
    };
    for (int64_t j = call.pattern.window_begin(i); j < call.pattern.window_end(i, keys); ++j)
      see(j);
    for (int64_t n = 0; n < far; ++n) {
      const int64_t j = i + call.pattern.far_shift(head, n);
      if (j >= 0 && j < keys) see(j);
    }
    int32_t weights = 0;
    std::fill_n(sums, call.dims, 0);
    for (int64_t n = 0; n < seen; ++n) {
      const int32_t p = weight(scores[n] - highest, call.exponent_scale);
      weights += p;
      for (int64_t d = 0; d < call.dims; ++d) sums[d] += p * v[key[n] * call.dims + d];
    }
    const float factor = weights ? packed.v_scale / static_cast<float>(weights) : 0.0f;
    store_row(call, batch, head, i,
              [&](int64_t d) { return static_cast<float>(sums[d]) * factor; });
  }
}

}  // namespace

const Kernel kScalar = {Isa::scalar, packed_bytes, scratch_ints, pack, block};

}  // namespace fastrec::window_sparse_attention_int8
