// take: elements of the middle dimension, chosen by an index: torch's gather and index_select.
//
// x [A, N, C] f32, i64 or bool; index i64 [A or 1, M, C or 1], counted from the end where it is
// negative; y of x's dtype [A, M, C]; all contiguous.
#include <cstring>

#include "engine/make_kind.h"
#include "engine/steps/middle.h"

namespace fastrec::engine {
namespace {

struct Take {
  static constexpr const char* name = "take";
  enum { x, index, y };
  static constexpr OperandRule operands[] = {
      {.name = "x"}, {.name = "index"}, {.name = "y", .output = true}};
  using Fields = NoFields;
  static constexpr Traits traits = {
      .op = "", .shown = "take", .users = Users::apart_of_two, .checked = {index, "ids", x, 1}};

  static Rows rows(const Fields&) { return Rows::mixed; }

  static void check(const StepCheck& check, const Fields&) {
    check.dense(x, {Dtype::f32, Dtype::i64, Dtype::b8});
    check.dense(index, {Dtype::i64});
    check.dense(y, {check.dtype(x)});
    const Shape &from = check.sizes(x), &at = check.sizes(index), &to = check.sizes(y);
    require(from.size() == 3 && at.size() == 3 && to.size() == 3, "operands of three dimensions");
    require(to[0] == from[0] && to[1] == at[1] && to[2] == from[2], "an element for each index");
    require(at[0] == from[0] || at[0] == Extent(1), "an index for each outer position, or for all");
    require(at[2] == from[2] || at[2] == Extent(1), "an index for each column, or for all");
  }

  static Status run(const Fields&, Tensors operands, const void*) {
    const Tensor &from = operands[x], &at = operands[index], &to = operands[y];
    const int64_t outer = to.sizes[0], count = to.sizes[1], width = to.sizes[2];
    const int64_t size = from.sizes[1], bytes = bytes_of(from.dtype);
    const bool rows = at.sizes[2] == 1;  // whole rows are copied
    const int64_t columns = at.sizes[2];
    if (outer * count * width == 0) return {};
    for (int64_t a = 0; a < outer; ++a) {
      const int64_t* const ids = at.as<int64_t>() + (at.sizes[0] == 1 ? 0 : a * count * columns);
      const std::byte* const source = from.data + a * size * width * bytes;
      std::byte* const result = to.data + a * count * width * bytes;
      for (int64_t i = 0; i < count * columns; ++i) {
        const int64_t id = ids[i] < 0 ? ids[i] + size : ids[i];
        if (id < 0 || id >= size) return {Fault::id_out_of_range, -1, ids[i]};
        if (rows)
          std::memcpy(result + i * width * bytes, source + id * width * bytes, width * bytes);
        else
          std::memcpy(result + i * bytes, source + (id * width + i % columns) * bytes, bytes);
      }
    }
    return {};
  }

  static void cost(const Fields&, Tensors, Cost& cost) { cost.peak = ""; }
};

}  // namespace

Kind take_kind() { return make_kind<Take>(); }

}  // namespace fastrec::engine
