// reduce: the sum, mean or maximum of the middle dimension.
// softmax: along the last dimension.
//
// operands  reduce: x f32 [A, N, C] contiguous; result f32, A * C elements, contiguous
//           softmax: x f32 [.., N]; result f32 of its shape; both contiguous
// integers  reduce: 0 sum, 1 mean, 2 maximum (a NaN wins, as in torch)
#include <algorithm>
#include <cmath>
#include <limits>

#include "engine/steps.h"
#include "parallel.h"
#include "scratch.h"

namespace fastrec::engine {
namespace {

constexpr int64_t kParallelElements = 32'768;

}  // namespace

Status run_reduce(const Step& step, const Tensor* operands) {
  const Tensor& x = operands[0];
  const int64_t count = x.sizes[1], width = x.sizes[2];
  const bool maximum = step.integers[0] == 2;
  const double divisor = step.integers[0] == 1 ? static_cast<double>(count) : 1.0;
  const int threads = x.count() < kParallelElements ? 1 : num_threads();
  parallel_for(x.sizes[0], 1, threads, [&](int64_t begin, int64_t end) {
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
  const int threads = x.count() < kParallelElements ? 1 : num_threads();
  parallel_for(x.count() / width, 1, threads, [&](int64_t begin, int64_t end) {
    for (int64_t r = begin; r < end; ++r) {
      const float* from = x.as<float>() + r * width;
      float* to = operands[1].as<float>() + r * width;
      const float top = *std::max_element(from, from + width);
      float sum = 0.0f;
      for (int64_t i = 0; i < width; ++i) sum += to[i] = std::exp(from[i] - top);
      for (int64_t i = 0; i < width; ++i) to[i] /= sum;
    }
  });
  return {};
}

}  // namespace fastrec::engine
