// Plain loops, any machine: the readable form of every vector kernel.
#include <algorithm>
#include <cmath>
#include <limits>

#include "float16.h"
#include "window_sparse_attention/window_sparse_attention.h"

namespace fastrec::window_sparse_attention {
namespace {

constexpr float kLowest = -std::numeric_limits<float>::infinity();

int64_t scratch_floats(const Pattern&, int64_t rows, int64_t dims) { return rows + 2 * dims; }

// Calls f(j) for every j in [0, others) that row i is paired with, nearest side first.
template <class F>
void for_each_pair(const Pattern& pattern, const Part& part, int64_t i, int64_t others, bool before,
                   bool after, F&& f) {
  const int64_t last = std::min(others - 1, after ? i + pattern.window : i);
  for (int64_t j = std::max<int64_t>(0, before ? i - pattern.window : i); j <= last; ++j) f(j);
  for (const int64_t distance : pattern.of_head(part.head)) {
    if (before && i - distance >= 0 && i - distance < others) f(i - distance);
    if (after && i + distance < others) f(i + distance);
  }
}

template <class T>
float dot(const T* a, const T* b, int64_t dims) {
  float sum = 0.0f;
  for (int64_t d = 0; d < dims; ++d) sum += to_float(a[d]) * to_float(b[d]);
  return sum;
}

template <class T>
void add(float* sum, float weight, const T* row, int64_t dims) {
  for (int64_t d = 0; d < dims; ++d) sum[d] += weight * to_float(row[d]);
}

template <class T>
void store(T* to, const float* sum, float factor, int64_t dims) {
  for (int64_t d = 0; d < dims; ++d) from_float(factor * sum[d], to[d]);
}

template <class T>
void forward(const Forward& call, const Part& part, float* scratch) {
  const int64_t dims = call.shape.dims;
  const auto q = rows_of<T>(call.q, part), k = rows_of<T>(call.k, part),
             v = rows_of<T>(call.v, part), out = rows_of<T>(call.out, part);
  const auto lse = rows_of<float>(call.lse, part);
  float *const sum = scratch, *const weights = scratch + dims;
  for (int64_t i = part.begin; i < part.end; ++i) {
    const auto keys = [&](auto&& f) {
      for_each_pair(*call.pattern, part, i, part.keys, true, !call.pattern->causal, f);
    };
    float highest = kLowest, total = 0.0f;
    int64_t n = 0;
    keys([&](int64_t j) {
      weights[n] = call.scale * dot(q[i], k[j], dims);
      highest = std::max(highest, weights[n++]);
    });
    std::fill_n(sum, dims, 0.0f);
    n = 0;
    keys([&](int64_t j) {
      const float weight = std::exp(weights[n++] - highest);
      total += weight;
      add(sum, weight, v[j], dims);
    });
    store(out[i], sum, n ? 1.0f / total : 0.0f, dims);
    if (lse.data) *lse[i] = n ? highest + std::log(total) : kLowest;
  }
}

template <class T>
void delta(const Backward& call, const Part& part) {
  const auto out = rows_of<T>(call.out, part), d_out = rows_of<T>(call.d_out, part);
  const auto d_lse = rows_of<float>(call.d_lse, part), delta = rows_of<float>(call.delta, part);
  for (int64_t i = part.begin; i < part.end; ++i)
    *delta[i] = dot(d_out[i], out[i], call.shape.dims) - (d_lse.data ? *d_lse[i] : 0.0f);
}

template <class T>
void grad_q(const Backward& call, const Part& part, float* sum) {
  const int64_t dims = call.shape.dims;
  const auto q = rows_of<T>(call.q, part), k = rows_of<T>(call.k, part),
             v = rows_of<T>(call.v, part), d_out = rows_of<T>(call.d_out, part),
             dq = rows_of<T>(call.dq, part);
  const auto lse = rows_of<float>(call.lse, part), delta = rows_of<float>(call.delta, part);
  for (int64_t i = part.begin; i < part.end; ++i) {
    std::fill_n(sum, dims, 0.0f);
    for_each_pair(*call.pattern, part, i, part.keys, true, !call.pattern->causal, [&](int64_t j) {
      const float weight = std::exp(call.scale * dot(q[i], k[j], dims) - *lse[i]);
      add(sum, weight * (dot(d_out[i], v[j], dims) - *delta[i]), k[j], dims);
    });
    store(dq[i], sum, call.scale, dims);
  }
}

template <class T>
void grad_kv(const Backward& call, const Part& part, float* scratch) {
  const int64_t dims = call.shape.dims;
  const auto q = rows_of<T>(call.q, part), k = rows_of<T>(call.k, part),
             v = rows_of<T>(call.v, part), d_out = rows_of<T>(call.d_out, part),
             dk = rows_of<T>(call.dk, part), dv = rows_of<T>(call.dv, part);
  const auto lse = rows_of<float>(call.lse, part), delta = rows_of<float>(call.delta, part);
  float *const sum_k = scratch, *const sum_v = scratch + dims;
  for (int64_t j = part.begin; j < part.end; ++j) {
    std::fill_n(scratch, 2 * dims, 0.0f);
    if (j < part.keys)
      for_each_pair(*call.pattern, part, j, part.rows, !call.pattern->causal, true, [&](int64_t i) {
        const float weight = std::exp(call.scale * dot(q[i], k[j], dims) - *lse[i]);
        add(sum_v, weight, d_out[i], dims);
        add(sum_k, weight * (dot(d_out[i], v[j], dims) - *delta[i]), q[i], dims);
      });
    store(dk[j], sum_k, call.scale, dims);
    store(dv[j], sum_v, 1.0f, dims);
  }
}

}  // namespace
}  // namespace fastrec::window_sparse_attention

// After the templates that it instantiates.
#include "window_sparse_attention/any_dtype.h"

namespace fastrec::window_sparse_attention {

const Kernel kScalar = {Isa::scalar, scratch_floats, forward_any,
                        delta_any,   grad_q_any,     grad_kv_any};

}  // namespace fastrec::window_sparse_attention
