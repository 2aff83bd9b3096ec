// scatter: x with elements of the middle dimension replaced, or added to, where an index says.
//
// x [A, N, C] f32, i64 or bool; index i64 [A or 1, M, C or 1], counted from the end where it is
// negative; values of x's dtype [A, M, C]; y as x; all contiguous. Where an index stands twice the
// last value stays, or both are added.
#include <cstring>

#include "engine/make_kind.h"
#include "engine/steps/middle.h"

namespace fastrec::engine {
namespace {

struct Scatter {
  static constexpr const char* name = "scatter";
  enum { x, index, values, y };
  static constexpr OperandRule operands[] = {
      {.name = "x"}, {.name = "index"}, {.name = "values"}, {.name = "y", .output = true}};
  struct Fields {
    bool adds = false;

    template <class V>
    void each(V& visit) {
      visit("adds", adds);
    }
  };
  static constexpr Traits traits = {
      .op = "", .shown = "scatter", .users = Users::apart_of_two, .checked = {index, "ids", x, 1}};

  static Rows rows(const Fields&) { return Rows::mixed; }

  static void check(const StepCheck& check, const Fields& fields) {
    check.dense(x, {Dtype::f32, Dtype::i64, Dtype::b8});
    require(!fields.adds || !check.is(x, {Dtype::b8}), "sums of numbers");
    check.dense(index, {Dtype::i64});
    check.dense(values, {check.dtype(x)});
    check.dense(y, {check.dtype(x)});
    const Shape &from = check.sizes(x), &at = check.sizes(index), &with = check.sizes(values);
    require(from.size() == 3 && at.size() == 3 && with.size() == 3, "operands of three dimensions");
    require(check.sizes(y) == from, "a result of the operand's size");
    require(with[0] == from[0] && with[1] == at[1] && with[2] == from[2], "a value for each index");
    require(at[0] == from[0] || at[0] == Extent(1), "an index for each outer position, or for all");
    require(at[2] == from[2] || at[2] == Extent(1), "an index for each column, or for all");
  }

  static Status run(const Fields& fields, Tensors operands, const void*) {
    const Tensor &from = operands[x], &at = operands[index], &to = operands[y];
    const int64_t outer = to.sizes[0], size = to.sizes[1], width = to.sizes[2];
    const int64_t count = at.sizes[1], columns = at.sizes[2];
    const int64_t bytes = bytes_of(from.dtype);
    if (outer * size * width == 0) return {};
    std::memcpy(to.data, from.data, outer * size * width * bytes);
    for (int64_t a = 0; a < outer; ++a) {
      const int64_t* const ids = at.as<int64_t>() + (at.sizes[0] == 1 ? 0 : a * count * columns);
      for (int64_t i = 0; i < count * columns; ++i) {
        const int64_t id = ids[i] < 0 ? ids[i] + size : ids[i];
        if (id < 0 || id >= size) return {Fault::id_out_of_range, -1, ids[i]};
        // One element, or a whole row of them.
        const int64_t elements = columns == 1 ? width : 1, column = columns == 1 ? 0 : i % columns;
        const int64_t target = (a * size + id) * width + column;
        const int64_t source = (a * count * columns + i) * elements;
        put(fields.adds, to, target, operands[values], source, elements);
      }
    }
    return {};
  }

  static void cost(const Fields&, Tensors, Cost& cost) { cost.peak = ""; }

 private:
  static void put(bool adds, const Tensor& to, int64_t target, const Tensor& from, int64_t source,
                  int64_t elements) {
    const int64_t bytes = bytes_of(to.dtype);
    if (!adds) {
      std::memcpy(to.data + target * bytes, from.data + source * bytes, elements * bytes);
      return;
    }
    for (int64_t i = 0; i < elements; ++i)
      if (to.dtype == Dtype::f32)
        to.as<float>()[target + i] += from.as<float>()[source + i];
      else  // wraps, as in torch
        to.as<int64_t>()[target + i] =
            static_cast<int64_t>(static_cast<uint64_t>(to.as<int64_t>()[target + i]) +
                                 static_cast<uint64_t>(from.as<int64_t>()[source + i]));
  }
};

}  // namespace

Kind scatter_kind() { return make_kind<Scatter>(); }

}  // namespace fastrec::engine
