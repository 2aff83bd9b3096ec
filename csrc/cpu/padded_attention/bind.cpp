#include "padded_attention/bind.h"

#include "padded_attention/padded_attention.h"

namespace py = pybind11;

namespace fastrec::padded_attention {

void bind(py::module_& parent) {
  py::module_ m = parent.def_submodule("padded_attention");
  m.def(
      "kernel_isa", [] { return kIsaTable[static_cast<int>(select().isa)].name; },
      "Name of the ISA whose kernel runs now.");
  m.def(
      "run",
      [](uintptr_t q, int64_t q_batch, int64_t q_head, int64_t q_row, uintptr_t k, int64_t k_batch,
         int64_t k_head, int64_t k_row, uintptr_t v, int64_t v_batch, int64_t v_head, int64_t v_row,
         uintptr_t out, uintptr_t lengths, int64_t batch, int64_t query_rows, int64_t key_rows,
         int64_t heads, int64_t head_dim, float scale) {
        const auto floats = [](uintptr_t p) { return reinterpret_cast<const float*>(p); };
        py::gil_scoped_release nogil;
        return run({{floats(q), q_batch, q_head, q_row},
                    {floats(k), k_batch, k_head, k_row},
                    {floats(v), v_batch, v_head, v_row},
                    reinterpret_cast<float*>(out),
                    reinterpret_cast<const int64_t*>(lengths),
                    batch,
                    query_rows,
                    key_rows,
                    heads,
                    head_dim,
                    scale,
                    {},
                    nullptr});
      },
      "Addresses, strides in floats, sizes, checked by the caller. The first bad length, or -1.");
}

}  // namespace fastrec::padded_attention
