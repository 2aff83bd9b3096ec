// argsort: the positions of a row's elements in order, the first k of them; equal elements keep
// their order.
//
// x f32 or i64 [A, N]; y i64 [A, k], k <= N; both contiguous. A NaN counts as the largest number,
// as in torch.
#include <algorithm>
#include <cmath>
#include <numeric>

#include "engine/make_kind.h"
#include "engine/steps/middle.h"
#include "scratch.h"

namespace fastrec::engine {
namespace {

bool larger(float a, float b) { return std::isnan(a) ? !std::isnan(b) : a > b; }
bool larger(int64_t a, int64_t b) { return a > b; }

template <class T>
void sort_row(const T* row, int64_t count, int64_t wanted, bool descending, int64_t* order,
              int64_t* result) {
  std::iota(order, order + count, int64_t{0});
  const auto before = [&](int64_t a, int64_t b) {
    const bool first = descending ? larger(row[a], row[b]) : larger(row[b], row[a]);
    const bool second = descending ? larger(row[b], row[a]) : larger(row[a], row[b]);
    return first || (!second && a < b);
  };
  std::partial_sort(order, order + wanted, order + count, before);
  std::copy_n(order, wanted, result);
}

struct Argsort {
  static constexpr const char* name = "argsort";
  enum { x, y };
  static constexpr OperandRule operands[] = {{.name = "x"}, {.name = "y", .output = true}};
  struct Fields {
    bool descending = false;

    template <class V>
    void each(V& visit) {
      visit("descending", descending);
    }
  };
  static constexpr Traits traits = {.op = "", .shown = "argsort", .users = Users::apart_of_two};

  static Rows rows(const Fields&) { return Rows::mixed; }

  static void check(const StepCheck& check, const Fields&) {
    check.dense(x, {Dtype::f32, Dtype::i64});
    check.dense(y, {Dtype::i64});
    const Shape &from = check.sizes(x), &to = check.sizes(y);
    require(from.size() == 2 && to.size() == 2, "operands of two dimensions");
    require(from[0] == to[0], "a row for each row");
    const bool numbers = from[1].is_number() && to[1].is_number();
    require(to[1] == from[1] || (numbers && to[1].coefficient <= from[1].coefficient),
            "as many positions as elements, at most");
  }

  static Status run(const Fields& fields, Tensors operands, const void*) {
    const Tensor &from = operands[x], &to = operands[y];
    const int64_t count = from.sizes[1], wanted = to.sizes[1];
    parallel_for(from.sizes[0], 1, threads_for(from), [&](int64_t begin, int64_t end) {
      int64_t* const order = scratch<int64_t>(count);
      for (int64_t a = begin; a < end; ++a) {
        int64_t* const result = to.as<int64_t>() + a * wanted;
        if (from.dtype == Dtype::f32)
          sort_row(from.as<float>() + a * count, count, wanted, fields.descending, order, result);
        else
          sort_row(from.as<int64_t>() + a * count, count, wanted, fields.descending, order, result);
      }
    });
    return {};
  }

  static void cost(const Fields&, Tensors, Cost& cost) { cost.peak = ""; }
};

}  // namespace

Kind argsort_kind() { return make_kind<Argsort>(); }

}  // namespace fastrec::engine
