// matmul: products of computed matrices, on the micro-kernels of grouped_linear with one group.
//
// a [.., M, K] f32, K contiguous; b [.., K, N] f32, its matrices contiguous by rows, or by columns;
// y f32 [.., M, N] contiguous. As many dimensions each, at least 2; those before the matrices have
// any strides.
#include <algorithm>

#include "engine/check.h"
#include "engine/make_kind.h"
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

struct Matmul {
  static constexpr const char* name = "matmul";
  enum { a, b, y };
  static constexpr OperandRule operands[] = {
      {.name = "a"}, {.name = "b"}, {.name = "y", .output = true}};
  struct Fields {
    bool transposed = false;  // the columns of b are contiguous, [N, K] in memory

    template <class V>
    void each(V& visit) {
      visit("transposed", transposed);
    }
  };
  static constexpr Traits traits = {
      .op = "grouped_linear", .shown = "matmul", .users = Users::apart_of_two};

  static Rows rows(const Fields&) { return Rows::mixed; }
  static Isa isa(const Fields&, Tensors) {
    return grouped_linear::select(grouped_linear::Dtype::f32).isa;
  }

  static void check(const StepCheck& check, const Fields& fields) {
    const Shape &left = check.sizes(a), &right = check.sizes(b);
    const size_t rank = left.size();
    require(rank == right.size() && rank >= 2, "as many dimensions, at least 2");
    require(check.is(a, {Dtype::f32}) && check.is(b, {Dtype::f32}), "matrices of float32");
    require(std::equal(left.begin(), left.end() - 2, right.begin()), "as many matrices");
    require(left[rank - 1] == right[rank - 2], "columns of a for the rows of b");
    check.unit(a, rank - 1, "contiguous rows of a");
    const size_t outer = fields.transposed ? rank - 1 : rank - 2;
    const size_t inner = fields.transposed ? rank - 2 : rank - 1;
    check.unit(b, inner, "contiguous matrices of b");
    require(check.view(b).strides[outer] == right[inner] || right[outer] == Extent(1),
            "contiguous matrices of b");
    check.dense(y, {Dtype::f32});
    Shape whole = left;
    whole[rank - 1] = right[rank - 1];
    require(check.sizes(y) == whole, "a result of rows of a by columns of b");
  }

  static Status run(const Fields& fields, Tensors operands, const void*) {
    namespace grouped = grouped_linear;
    const Tensor &a = operands[Matmul::a], &b = operands[Matmul::b], &result = operands[y];
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
      const grouped::Matrix rows{
          a.as<float>() + matrix_at(a, index), grouped::Dtype::f32, row, {0, 1}};
      const float* const weight = b.as<float>() + matrix_at(b, index);
      const grouped::Matrix to{result.as<float>() + index * m * n, grouped::Dtype::f32, n, {0, 1}};
      if (fields.transposed)
        grouped::forward(rows, weight, nullptr, to, {m, 1, n, k});
      else
        grouped::input_gradient(rows, weight, to, {m, 1, k, n});
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

  static void cost(const Fields&, Tensors operands, Cost& cost) {
    const Tensor& left = operands[a];
    cost.macs = operands[y].count() * left.sizes[left.dims - 1];
    cost.peak = "fp32";
  }
};

}  // namespace

Kind matmul_kind() { return make_kind<Matmul>(); }

}  // namespace fastrec::engine
