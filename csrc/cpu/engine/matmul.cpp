// matmul: products of computed matrices, on the micro-kernels of grouped_linear with one group.
//
// operands  a [.., M, K] f32, K contiguous; b [.., K, N] f32, its matrices contiguous by rows, or
// by
//           columns if integers[0]; result f32 [.., M, N] contiguous. As many dimensions each, at
//           least 2; those before the matrices have any strides
// integers  whether the columns of b are contiguous, [N, K]
#include <algorithm>

#include "engine/steps.h"
#include "grouped_linear/grouped_linear.h"
#include "parallel.h"

namespace fastrec::engine {
namespace {

constexpr int64_t kParallelMultiplyAdds = 200'000;

// Where matrix `index` of an operand begins.
int64_t matrix_at(const Tensor& tensor, int64_t index) {
  int64_t offset = 0;
  for (int d = tensor.dims - 3; d >= 0; --d) {
    offset += index % tensor.sizes[d] * tensor.strides[d];
    index /= tensor.sizes[d];
  }
  return offset;
}

}  // namespace

Status run_matmul(const Step& step, const Tensor* operands) {
  namespace grouped = grouped_linear;
  const bool columns = step.integers[0] != 0;
  const Tensor &a = operands[0], &b = operands[1], &result = operands[2];
  const int dims = a.dims;
  const int64_t m = a.sizes[dims - 2], k = a.sizes[dims - 1], n = b.sizes[dims - 1];
  int64_t matrices = 1;
  for (int d = 0; d < dims - 2; ++d) matrices *= result.sizes[d];
  if (matrices * m * n == 0) return {};
  if (k == 0) {
    std::fill_n(result.as<float>(), matrices * m * n, 0.0f);
    return {};
  }
  const int64_t row = a.strides[dims - 2];
  const auto multiply = [&](int64_t index) {
    const grouped::Matrix x{a.as<float>() + matrix_at(a, index), grouped::Dtype::f32, row, {0, 1}};
    const float* const weight = b.as<float>() + matrix_at(b, index);
    const grouped::Matrix y{result.as<float>() + index * m * n, grouped::Dtype::f32, n, {0, 1}};
    if (columns)
      grouped::forward(x, weight, nullptr, y, {m, 1, n, k});
    else
      grouped::input_gradient(x, weight, y, {m, 1, k, n});
  };
  if (matrices == 1) {
    multiply(0);
    return {};
  }
  const int threads = matrices * m * k * n < kParallelMultiplyAdds ? 1 : num_threads();
  parallel_for(matrices, 1, threads, [&](int64_t begin, int64_t end) {
    for (int64_t index = begin; index < end; ++index) multiply(index);
  });
  return {};
}

}  // namespace fastrec::engine
