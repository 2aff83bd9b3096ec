// gather: rows of a table.
//
// ids i64 contiguous, of n ids; table [R, D] f32 or s8, a constant; scale [R] f32, of s8 tables
// only; y f32 of n * D elements, contiguous.
#include <algorithm>
#include <cstring>

#include "engine/check.h"
#include "engine/make_kind.h"
#include "int8_embedding/int8_embedding.h"

namespace fastrec::engine {
namespace {

struct Gather {
  static constexpr const char* name = "gather";
  enum { ids, table, scale, y };
  static constexpr OperandRule operands[] = {{.name = "ids"},
                                             {.name = "table"},
                                             {.name = "scale", .optional = true},
                                             {.name = "y", .output = true}};
  using Fields = NoFields;
  static constexpr Traits traits = {
      .op = "", .shown = "gather", .users = Users::apart, .checked = {ids, "ids", table, 0}};

  static Rows rows(const Fields&) { return Rows::lookup; }
  static const char* shown(const Fields&, Tensors operands) {
    return operands[table].dtype == Dtype::s8 ? "int8_embedding" : traits.shown;
  }
  static std::optional<Isa> isa(const Fields&, Tensors operands) {
    if (operands[table].dtype != Dtype::s8) return std::nullopt;
    return int8_embedding::select().isa;
  }

  static void check(const StepCheck& check, const Fields&) {
    check.dense(ids, {Dtype::i64});
    const Shape& sizes = check.sizes(table);
    require(sizes.size() == 2, "a table of two dimensions");
    require(sizes[0].is_number() && sizes[1].is_number(), "a table of a fixed size");
    const int64_t rows = sizes[0].coefficient, dims = sizes[1].coefficient;
    check.table(table, check.has(scale) ? Dtype::s8 : Dtype::f32, {rows, dims});
    if (check.has(scale)) check.table(scale, Dtype::f32, {rows});
    check.dense(y, {Dtype::f32});
    check.elements(y, times(product(check.sizes(ids)), dims), "a row for each id");
  }

  static Status run(const Fields&, Tensors operands, const void*) {
    const Tensor &ids_in = operands[ids], &from = operands[table], &result = operands[y];
    const int64_t count = ids_in.count(), rows = from.sizes[0], dims = from.sizes[1];
    const int64_t* id = ids_in.as<int64_t>();
    if (from.dtype == Dtype::s8) {
      const int64_t bad = int8_embedding::run({id, from.as<int8_t>(), operands[scale].as<float>(),
                                               result.as<float>(), count, rows, dims});
      return bad < 0 ? Status{} : Status{Fault::id_out_of_range, -1, id[bad]};
    }
    for (int64_t i = 0; i < count; ++i) {
      if (id[i] < 0 || id[i] >= rows) return {Fault::id_out_of_range, -1, id[i]};
      std::memcpy(result.as<float>() + i * dims, from.as<float>() + id[i] * dims,
                  dims * sizeof(float));
    }
    return {};
  }

  // Of the table, the rows asked for.
  static void cost(const Fields&, Tensors operands, Cost& cost) {
    const Tensor& from = operands[table];
    const int64_t rows = std::min(operands[ids].count(), from.sizes[0]);
    const int64_t scale_bytes = from.dtype == Dtype::s8 ? 4 : 0;
    cost.constant_bytes = rows * (from.sizes[1] * bytes_of(from.dtype) + scale_bytes);
    cost.peak = "";
  }
};

}  // namespace

Kind gather_kind() { return make_kind<Gather>(); }

}  // namespace fastrec::engine
