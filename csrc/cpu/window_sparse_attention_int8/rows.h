// Addresses and the output rule shared by the kernels; compiled for the baseline.
#pragma once

#include <algorithm>
#include <cmath>

#include "window_sparse_attention_int8/window_sparse_attention_int8.h"

namespace fastrec::window_sparse_attention_int8 {
namespace {

template <class T>
const T* head_of(const Rows& rows, int64_t batch, int64_t head) {
  return static_cast<const T*>(rows.data) + batch * rows.batch_stride + head * rows.head_stride;
}

// Turns a byte around 128 into the s8, and leaves an s8.
inline uint8_t flip_of(bool u8) { return u8 ? 0x80 : 0; }

// The scale of bytes.
inline float value_scale(const Call& call, int64_t batch, int64_t head) {
  return call.v_scale ? call.v_scale[batch * call.heads + head] : call.v_scale_of_all;
}

// The largest |v| of the valid rows; negative where one is not finite.
inline float largest_value(const Call& call, int64_t batch, int64_t head) {
  const float* v = head_of<float>(call.v, batch, head);
  constexpr int kLanes = 16;
  // x - x is 0 for every finite x, NaN otherwise; in lanes too, as one sum would wait for itself.
  float lanes[kLanes] = {}, differences[kLanes] = {};
  for (int64_t j = 0; j < call.keys(batch); ++j) {
    const float* row = v + j * call.v.row_stride;
    int64_t d = 0;
    for (; d + kLanes <= call.dims; d += kLanes)
      for (int i = 0; i < kLanes; ++i) {
        lanes[i] = std::max(lanes[i], std::fabs(row[d + i]));
        differences[i] += row[d + i] - row[d + i];
      }
    for (; d < call.dims; ++d) {
      lanes[0] = std::max(lanes[0], std::fabs(row[d]));
      differences[0] += row[d] - row[d];
    }
  }
  const bool finite =
      std::all_of(differences, differences + kLanes, [](float x) { return x == 0.0f; });
  return finite ? *std::max_element(lanes, lanes + kLanes) : -1.0f;
}

// 127 / largest; 0 for a head of zeros, and for one so small that the quotient overflows.
inline float inverse_scale(float largest) {
  const float inverse = 127.0f / largest;
  return std::isfinite(inverse) ? inverse : 0.0f;
}

inline int64_t out_at(const Call& call, int64_t batch, int64_t head, int64_t row) {
  return batch * call.out.batch_stride + head * call.out.head_stride + row * call.out.row_stride;
}

// Writes row i of a head; value(d) is its float.
template <class Value>
inline void store_row(const Call& call, int64_t batch, int64_t head, int64_t i, Value value) {
  const int64_t at = out_at(call, batch, head, i);
  if (!call.out_u8) {
    float* to = static_cast<float*>(call.out.data) + at;
    for (int64_t d = 0; d < call.dims; ++d) to[d] = value(d);
    return;
  }
  uint8_t* to = static_cast<uint8_t*>(call.out.data) + at;
  const float inverse = 1.0f / call.out_scale;
  const auto zero = static_cast<float>(call.out_zero_point);
  for (int64_t d = 0; d < call.dims; ++d) {
    const float clipped = std::min(std::max(value(d) * inverse, -zero), 255.0f - zero);
    to[d] = static_cast<uint8_t>(std::nearbyint(clipped) + zero);
  }
}

}  // namespace
}  // namespace fastrec::window_sparse_attention_int8
