// reduce: the sum, mean or maximum of the middle dimension.
// cumsum: the sums up to each position of the middle dimension.
// softmax: along the last dimension.
//
// operands  reduce: x f32 or i64 [A, N, C] contiguous; result of its dtype, A * C elements,
//           contiguous; no mean of i64
//           cumsum: x f32 or i64 [A, N, C]; result of its dtype and shape; both contiguous
//           softmax: x f32 [.., N]; result f32 of its shape; both contiguous
// integers  reduce: 0 sum, 1 mean, 2 maximum (a NaN wins, as in torch)
#include <algorithm>
#include <limits>

#include "engine/steps.h"
#include "padded_attention/padded_attention.h"
#include "parallel.h"
#include "scratch.h"

namespace fastrec::engine {
namespace {

constexpr int64_t kParallelElements = 32'768;

int threads_for(const Tensor& x) { return x.count() < kParallelElements ? 1 : num_threads(); }

// The sum of a row: several partial ones, so that an addition need not wait for the one before.
double sum_of(const float* row, int64_t count) {
  constexpr int kSums = 8;
  double sums[kSums] = {};
  int64_t n = 0;
  for (; n + kSums <= count; n += kSums)
    for (int i = 0; i < kSums; ++i) sums[i] += row[n + i];
  for (; n < count; ++n) sums[0] += row[n];
  return ((sums[0] + sums[1]) + (sums[2] + sums[3])) + ((sums[4] + sums[5]) + (sums[6] + sums[7]));
}

// Integers wrap, as in torch.
void reduce_integers(const Tensor& x, bool maximum, int64_t* result) {
  const int64_t count = x.sizes[1], width = x.sizes[2];
  parallel_for(x.sizes[0], 1, threads_for(x), [&](int64_t begin, int64_t end) {
    for (int64_t a = begin; a < end; ++a)
      for (int64_t c = 0; c < width; ++c) {
        const int64_t* from = x.as<int64_t>() + a * count * width + c;
        uint64_t sum = 0;
        int64_t top = std::numeric_limits<int64_t>::min();
        for (int64_t n = 0; n < count; ++n, from += width) {
          sum += static_cast<uint64_t>(*from);
          top = std::max(top, *from);
        }
        result[a * width + c] = maximum ? top : static_cast<int64_t>(sum);
      }
  });
}

}  // namespace

Status run_cumsum(const Step&, const Tensor* operands) {
  const Tensor &x = operands[0], &y = operands[1];
  const int64_t count = x.sizes[1], width = x.sizes[2];
  parallel_for(x.sizes[0], 1, threads_for(x), [&](int64_t begin, int64_t end) {
    for (int64_t line = begin * width; line < end * width; ++line) {
      int64_t at = line / width * count * width + line % width;
      double total = 0;
      uint64_t integers = 0;
      for (int64_t n = 0; n < count; ++n, at += width) {
        if (x.dtype == Dtype::f32)
          y.as<float>()[at] = static_cast<float>(total += x.as<float>()[at]);
        else
          y.as<int64_t>()[at] =
              static_cast<int64_t>(integers += static_cast<uint64_t>(x.as<int64_t>()[at]));
      }
    }
  });
  return {};
}

Status run_reduce(const Step& step, const Tensor* operands) {
  const Tensor& x = operands[0];
  const int64_t count = x.sizes[1], width = x.sizes[2];
  const bool maximum = step.integers[0] == 2;
  const double divisor = step.integers[0] == 1 ? static_cast<double>(count) : 1.0;
  if (x.dtype == Dtype::i64) {
    reduce_integers(x, maximum, operands[1].as<int64_t>());
    return {};
  }
  parallel_for(x.sizes[0], 1, threads_for(x), [&](int64_t begin, int64_t end) {
    if (width == 1 && !maximum) {
      for (int64_t a = begin; a < end; ++a)
        operands[1].as<float>()[a] =
            static_cast<float>(sum_of(x.as<float>() + a * count, count) / divisor);
      return;
    }
    double* const total = scratch<double>(width);
    for (int64_t a = begin; a < end; ++a) {
      const float* row = x.as<float>() + a * count * width;
      std::fill_n(total, width, maximum ? -std::numeric_limits<double>::infinity() : 0.0);
      for (int64_t n = 0; n < count; ++n, row += width) {
        if (maximum)
          for (int64_t c = 0; c < width; ++c)
            total[c] = row[c] > total[c] || row[c] != row[c] ? row[c] : total[c];
        else
          for (int64_t c = 0; c < width; ++c) total[c] += row[c];
      }
      float* result = operands[1].as<float>() + a * width;
      for (int64_t c = 0; c < width; ++c) result[c] = static_cast<float>(total[c] / divisor);
    }
  });
  return {};
}

Status run_softmax(const Step&, const Tensor* operands) {
  const Tensor& x = operands[0];
  const int64_t width = x.sizes[x.dims - 1];
  if (width == 0) return {};
  const auto softmax = padded_attention::select().softmax;
  parallel_for(x.count() / width, 1, threads_for(x), [&](int64_t begin, int64_t end) {
    for (int64_t r = begin; r < end; ++r) {
      float* const to = operands[1].as<float>() + r * width;
      std::copy_n(x.as<float>() + r * width, width, to);
      const float inverse_sum = softmax(to, width);
      for (int64_t i = 0; i < width; ++i) to[i] *= inverse_sum;
    }
  });
  return {};
}

}  // namespace fastrec::engine
