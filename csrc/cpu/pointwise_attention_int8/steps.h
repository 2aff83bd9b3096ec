// The op's steps one element at a time, as pointwise_attention_int8.h writes them down.
#pragma once

#include <algorithm>
#include <cmath>

#include "pointwise_attention_int8/pointwise_attention_int8.h"

namespace fastrec::pointwise_attention_int8 {
namespace {

int32_t dot(const int8_t* a, const int8_t* b, int64_t dims) {
  int32_t sum = 0;
  for (int64_t d = 0; d < dims; ++d) sum += int32_t{a[d]} * b[d];
  return sum;
}

float silu(float x) {
  const float p = std::min(std::max(x * kMinusLog2E, -126.0f), 126.0f), n = std::nearbyintf(p);
  const float r = p - n;
  float e = kPower[0];
  for (int i = 1; i < 7; ++i) e = e * r + kPower[i];
  e = e * std::ldexp(1.0f, static_cast<int>(n));
  return x * (1.0f / (1.0f + e));
}

// The biased score of row i and key j of a sequence to a weight.
class Weights {
 public:
  Weights(const Call& call, const Tables& tables, const Sequence& sequence, int64_t head)
      : call_(call),
        buckets_(tables.buckets),
        q_(rows_of<const int8_t>(call.q, sequence, head)),
        k_(rows_of<const int8_t>(call.k, sequence, head)),
        position_(tables.position_of(head)) {
    if (!call.bias.time) return;
    const int64_t at = times_at(call.shape, sequence);
    time_ = call.bias.time + head * call.bias.time_stride;
    times_ = call.bias.times + at;
    query_times_ = call.bias.query_times + at;
  }
  float operator()(int64_t i, int64_t j) const {
    float x = static_cast<float>(dot(q_[i], k_[j], call_.shape.dims)) * call_.score_scale;
    if (position_) x = x + position_[i - j];
    if (time_)
      x = x + time_[bucket_of(buckets_, pointwise_attention::apart(query_times_[i], times_[j]))];
    return silu(x);
  }

 private:
  const Call& call_;
  const pointwise_attention::Buckets& buckets_;
  Rows<const int8_t> q_, k_;
  const float *position_, *time_ = nullptr;
  const int64_t *times_ = nullptr, *query_times_ = nullptr;
};

// Adds keys [begin, end) to a row's sum, whose numbers lie `stride` apart.
void add_run(const float* weights, Rows<const int8_t> v, int64_t begin, int64_t end, int64_t dims,
             float* sum, int64_t stride) {
  float largest = kSmallest;
  for (int64_t j = begin; j < end; ++j) largest = std::max(largest, std::fabs(weights[j - begin]));
  const float inverse = 127.0f / largest, step = largest / 127.0f;
  int32_t rounded[kRun];
  for (int64_t j = begin; j < end; ++j)
    rounded[j - begin] = static_cast<int32_t>(std::nearbyintf(weights[j - begin] * inverse));
  for (int64_t d = 0; d < dims; ++d) {
    int32_t total = 0;
    for (int64_t j = begin; j < end; ++j) total += rounded[j - begin] * v[j][d];
    sum[d * stride] = sum[d * stride] + static_cast<float>(total) * step;
  }
}

}  // namespace
}  // namespace fastrec::pointwise_attention_int8
