// reduce: the sum, mean, maximum or minimum of the middle dimension.
//
// x f32 or i64 [A, N, C]; y of its dtype, A * C elements; both contiguous. No mean of i64; of a
// maximum or minimum a NaN wins, as in torch.
#include <algorithm>
#include <limits>

#include "engine/loops/loops.h"
#include "engine/make_kind.h"
#include "engine/steps/middle.h"
#include "scratch.h"

namespace fastrec::engine {
namespace {

using Operation = loops::Reduction;
constexpr const char* kOperationNames[] = {"sum", "mean", "max", "min"};

// Integers wrap, as in torch.
void reduce_integers(const Tensor& x, Operation operation, int64_t* result) {
  const int64_t count = x.sizes[1], width = x.sizes[2];
  parallel_for(x.sizes[0], 1, threads_for(x), [&](int64_t begin, int64_t end) {
    for (int64_t a = begin; a < end; ++a)
      for (int64_t c = 0; c < width; ++c) {
        const int64_t* from = x.as<int64_t>() + a * count * width + c;
        uint64_t sum = 0;
        int64_t top = std::numeric_limits<int64_t>::min();
        int64_t least = std::numeric_limits<int64_t>::max();
        for (int64_t n = 0; n < count; ++n, from += width) {
          sum += static_cast<uint64_t>(*from);
          top = std::max(top, *from);
          least = std::min(least, *from);
        }
        result[a * width + c] = operation == Operation::max   ? top
                                : operation == Operation::min ? least
                                                              : static_cast<int64_t>(sum);
      }
  });
}

struct Reduce {
  static constexpr const char* name = "reduce";
  enum { x, y };
  static constexpr OperandRule operands[] = {{.name = "x"}, {.name = "y", .output = true}};
  struct Fields {
    Operation operation = Operation::sum;

    template <class V>
    void each(V& visit) {
      visit("operation", operation, kOperationNames);
    }
  };
  static constexpr Traits traits = {.op = "", .shown = "reduce", .users = Users::apart_of_two};

  static Rows rows(const Fields&) { return Rows::mixed; }

  static void check(const StepCheck& check, const Fields& fields) {
    check_middle(check, x, y, fields.operation != Operation::mean);
    const Shape& sizes = check.sizes(x);
    check.elements(y, times(sizes[0], sizes[2]), "a result of the outer sizes");
  }

  static Status run(const Fields& fields, Tensors operands, const void*) {
    const Tensor& x = operands[Reduce::x];
    const int64_t count = x.sizes[1], width = x.sizes[2];
    if (x.dtype == Dtype::i64) {
      reduce_integers(x, fields.operation, operands[y].as<int64_t>());
      return {};
    }
    const auto reduce = loops::select().reduce;
    parallel_for(x.sizes[0], 1, threads_for(x), [&](int64_t begin, int64_t end) {
      double* const total = scratch<double>(width);
      for (int64_t a = begin; a < end; ++a)
        reduce(fields.operation, x.as<float>() + a * count * width, count, width, total,
               operands[y].as<float>() + a * width);
    });
    return {};
  }

  static void cost(const Fields&, Tensors, Cost& cost) { cost.peak = ""; }
};

}  // namespace

Kind reduce_kind() { return make_kind<Reduce>(); }

}  // namespace fastrec::engine
