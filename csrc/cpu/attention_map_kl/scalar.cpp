// Plain loops, any machine: the readable form of every vector kernel.
#include <algorithm>
#include <cmath>
#include <limits>

#include "attention_map_kl/attention_map_kl.h"

namespace fastrec::attention_map_kl {
namespace {

int64_t most_keys(const Call& call, int64_t far) {
  return std::min(call.length, 2 * call.pattern.window + 1) + far;
}

// Student's scores, teacher's, and the keys' numbers as floats' worth of int64.
int64_t scratch_floats(const Call& call, int64_t far) { return 4 * most_keys(call, far); }

float dot(const float* a, const float* b, int64_t dims) {
  float sum = 0.0f;
  for (int64_t d = 0; d < dims; ++d) sum += a[d] * b[d];
  return sum;
}

// The log of the sum of e^score.
float log_sum_exp(const float* scores, int64_t count) {
  const float highest = *std::max_element(scores, scores + count);
  float sum = 0.0f;
  for (int64_t n = 0; n < count; ++n) sum += std::exp(scores[n] - highest);
  return highest + std::log(sum);
}

void head(const Call& call, int64_t b, int64_t h, float* scratch) {
  const int64_t keys = call.keys(b), far = call.pattern.far_count(h);
  auto* const key = reinterpret_cast<int64_t*>(scratch);
  float* const student = scratch + 2 * most_keys(call, far);
  float* const teacher = student + most_keys(call, far);
  const Rows &sq = call.student_q, &sk = call.student_k, &tq = call.teacher_q, &tk = call.teacher_k;
  const int64_t at = (b * call.heads + h) * call.length * sq.dims;
  if (call.dq) {
    std::fill_n(call.dq + at, call.length * sq.dims, 0.0f);
    std::fill_n(call.dk + at, call.length * sq.dims, 0.0f);
  }
  double total = 0.0;
  for (int64_t i = 0; i < keys; ++i) {
    int64_t seen = 0;
    for (int64_t j = call.pattern.window_begin(i); j < call.pattern.window_end(i, keys); ++j)
      key[seen++] = j;
    for (int64_t n = 0; n < far; ++n) {
      const int64_t j = i + call.pattern.far_shift(h, n);
      if (j >= 0 && j < keys) key[seen++] = j;
    }
    const float* const query = sq.head(b, h) + i * sq.row_stride;
    for (int64_t n = 0; n < seen; ++n) {
      student[n] = call.student_scale * dot(query, sk.head(b, h) + key[n] * sk.row_stride, sq.dims);
      teacher[n] = call.teacher_causal && key[n] > i
                       ? -std::numeric_limits<float>::infinity()
                       : call.teacher_scale * dot(tq.head(b, h) + i * tq.row_stride,
                                                  tk.head(b, h) + key[n] * tk.row_stride, tq.dims);
    }
    const float teacher_log = log_sum_exp(teacher, seen);
    const float student_log = log_sum_exp(student, seen);
    for (int64_t n = 0; n < seen; ++n) {
      const float target = std::exp(teacher[n] - teacher_log);
      const float own = std::exp(student[n] - student_log);
      if (target != 0) total += target * ((teacher[n] - teacher_log) - (student[n] - student_log));
      if (!call.dq) continue;
      const float slope = call.student_scale * (own - target);
      const float* const row = sk.head(b, h) + key[n] * sk.row_stride;
      for (int64_t d = 0; d < sq.dims; ++d) {
        call.dq[at + i * sq.dims + d] += slope * row[d];
        call.dk[at + key[n] * sq.dims + d] += slope * query[d];
      }
    }
  }
  call.kl[b * call.heads + h] = static_cast<float>(total);
}

}  // namespace

const Kernel kScalar = {Isa::scalar, scratch_floats, head};

}  // namespace fastrec::attention_map_kl
