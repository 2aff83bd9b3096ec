#include "int8_embedding_sum/bind.h"

#include <pybind11/stl.h>

#include <tuple>
#include <vector>

#include "int8_embedding_sum/int8_embedding_sum.h"

namespace py = pybind11;

namespace fastrec::int8_embedding_sum {

void bind(py::module_& parent) {
  // rows, scale, ids, type, count, period, padding_id
  using Row = std::tuple<uintptr_t, uintptr_t, uintptr_t, int, int64_t, int64_t, int64_t>;
  py::module_ m = parent.def_submodule("int8_embedding_sum");
  m.attr("MAX_TABLES") = kMaxTables;
  m.def(
      "kernel_isa", [] { return kIsaTable[static_cast<int>(select().isa)].name; },
      "Name of the ISA whose kernel runs now.");
  m.def(
      "run",
      [](const std::vector<Row>& tables, uintptr_t out, bool out_u8, float scale,
         int32_t zero_point, int64_t rows, int64_t dims) {
        Call call{};
        for (const auto& [address, row_scale, ids, type, count, period, padding_id] : tables)
          call.tables[call.table_count++] = {reinterpret_cast<const void*>(address),
                                             reinterpret_cast<const float*>(row_scale),
                                             reinterpret_cast<const int64_t*>(ids),
                                             static_cast<Type>(type),
                                             count,
                                             period,
                                             padding_id};
        call.out = reinterpret_cast<void*>(out);
        call.out_u8 = out_u8;
        call.quantisation = {scale, zero_point};
        call.rows = rows;
        call.dims = dims;
        Result result;
        {
          py::gil_scoped_release nogil;
          result = run(call);
        }
        return std::make_tuple(static_cast<int>(result.status), result.table, result.position);
      },
      "Tables (rows, scale, ids, type, count, period, padding_id), at most MAX_TABLES, checked by "
      "the caller. (status, table, position): 0 done, 1 a bad id there, 2 a NaN was to be "
      "quantised.");
}

}  // namespace fastrec::int8_embedding_sum
