// Plain loops, any machine: the readable form of every vector kernel.
#include <algorithm>
#include <cmath>

#include "pointwise_attention/pointwise_attention.h"

namespace fastrec::pointwise_attention {
namespace {

int64_t forward_floats(const Call& call) { return call.shape.value_dims; }

int64_t backward_floats(const Call& call, int64_t rows) {
  return (rows + 1) * call.shape.dims + rows * call.shape.value_dims;
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

// The biases of a pair's score, and their places in the tables.
class PairBias {
 public:
  PairBias(const Call& call, const Tables& tables, const Sequence& sequence, int64_t head)
      : bias_(call.bias), buckets_(tables.buckets), position_(tables.position_of(head)) {
    if (!bias_.time) return;
    time_ = bias_.time + head * bias_.time_stride;
    times_ = bias_.times + times_at(call.shape, sequence);
    query_times_ = bias_.query_times + times_at(call.shape, sequence);
  }
  int64_t bucket(int64_t i, int64_t j) const {
    return bucket_of(buckets_, apart(query_times_[i], times_[j]));
  }
  int64_t entry(int64_t i, int64_t j) const {
    const int64_t last = bias_.positions - 1;
    return last + std::clamp(j - i, -last, last);
  }
  float operator()(int64_t i, int64_t j) const {
    return (position_ ? position_[i - j] : 0.0f) + (time_ ? time_[bucket(i, j)] : 0.0f);
  }

 private:
  const Bias& bias_;
  const Buckets& buckets_;
  const float *position_, *time_ = nullptr;
  const int64_t *times_ = nullptr, *query_times_ = nullptr;
};

template <class T>
void forward(const Call& call, const Tables& tables, const Part& part, float* sum) {
  const int64_t dims = call.shape.dims, value_dims = call.shape.value_dims;
  const Sequence& sequence = part.sequence;
  for (int64_t h = 0; h < call.shape.heads; ++h) {
    const auto q = rows_of<T>(call.q, sequence, h), k = rows_of<T>(call.k, sequence, h),
               v = rows_of<T>(call.v, sequence, h), out = rows_of<T>(call.out, sequence, h);
    const PairBias bias(call, tables, sequence, h);
    for (int64_t i = part.begin; i < part.end; ++i) {
      std::fill_n(sum, value_dims, 0.0f);
      for (int64_t j = 0; j < sequence.rows; ++j) {
        if (!sees(call.causal, sequence.history, i, j)) continue;
        const float score = call.scale * dot(q[i], k[j], dims) + bias(i, j);
        add(sum, score / (1.0f + std::exp(-score)), v[j], value_dims);
      }
      store(out[i], sum, call.inverse_norm, value_dims);
    }
  }
}

template <class T>
void backward(const Call& call, const Gradients& to, const Tables& tables, const Sequence& sequence,
              int64_t h, const TableGradients& own, float* scratch) {
  const int64_t dims = call.shape.dims, value_dims = call.shape.value_dims, rows = sequence.rows;
  const auto q = rows_of<T>(call.q, sequence, h), k = rows_of<T>(call.k, sequence, h),
             v = rows_of<T>(call.v, sequence, h), d_out = rows_of<T>(to.d_out, sequence, h),
             dq = rows_of<T>(to.dq, sequence, h), dk = rows_of<T>(to.dk, sequence, h),
             dv = rows_of<T>(to.dv, sequence, h);
  const PairBias bias(call, tables, sequence, h);
  float *const sum_q = scratch, *const sum_k = sum_q + dims, *const sum_v = sum_k + rows * dims;
  std::fill_n(sum_k, rows * (dims + value_dims), 0.0f);
  for (int64_t i = 0; i < rows; ++i) {
    std::fill_n(sum_q, dims, 0.0f);
    for (int64_t j = 0; j < rows; ++j) {
      if (!sees(call.causal, sequence.history, i, j)) continue;
      const float score = call.scale * dot(q[i], k[j], dims) + bias(i, j);
      const float sigmoid = 1.0f / (1.0f + std::exp(-score));
      const float weight = score * sigmoid;
      const float slope = sigmoid + weight * (1.0f - sigmoid);
      const float grad = slope * dot(d_out[i], v[j], value_dims);
      add(sum_q, grad, k[j], dims);
      add(sum_k + j * dims, grad, q[i], dims);
      add(sum_v + j * value_dims, weight, d_out[i], value_dims);
      if (own.position) own.position[bias.entry(i, j)] += grad;
      if (own.time) own.time[bias.bucket(i, j)] += grad;
    }
    store(dq[i], sum_q, call.scale * call.inverse_norm, dims);
  }
  for (int64_t j = 0; j < rows; ++j) {
    store(dk[j], sum_k + j * dims, call.scale * call.inverse_norm, dims);
    store(dv[j], sum_v + j * value_dims, call.inverse_norm, value_dims);
  }
}

void forward_any(const Call& call, const Tables& tables, const Part& part, float* scratch) {
  with_dtype(call.shape.dtype, [&](auto t) { forward<decltype(t)>(call, tables, part, scratch); });
}

void backward_any(const Call& call, const Gradients& to, const Tables& tables,
                  const Sequence& sequence, int64_t head, const TableGradients& own,
                  float* scratch) {
  with_dtype(call.shape.dtype, [&](auto t) {
    backward<decltype(t)>(call, to, tables, sequence, head, own, scratch);
  });
}

}  // namespace

const Kernel kScalar = {Isa::scalar, forward_floats, backward_floats, forward_any, backward_any};

}  // namespace fastrec::pointwise_attention
