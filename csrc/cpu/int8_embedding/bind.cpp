#include "int8_embedding/bind.h"

#include "int8_embedding/int8_embedding.h"

namespace py = pybind11;

namespace fastrec::int8_embedding {

void bind(py::module_& parent) {
  py::module_ m = parent.def_submodule("int8_embedding");
  m.def(
      "kernel_isa", [] { return kIsaTable[static_cast<int>(select().isa)].name; },
      "Name of the ISA whose kernel runs now.");
  m.def(
      "run",
      [](uintptr_t ids, uintptr_t table, uintptr_t scale, uintptr_t out, int64_t count,
         int64_t rows, int64_t dims) {
        py::gil_scoped_release nogil;
        return run({reinterpret_cast<const int64_t*>(ids), reinterpret_cast<const int8_t*>(table),
                    reinterpret_cast<const float*>(scale), reinterpret_cast<float*>(out), count,
                    rows, dims});
      },
      "Position of the first id outside the table, or -1.");
}

}  // namespace fastrec::int8_embedding
