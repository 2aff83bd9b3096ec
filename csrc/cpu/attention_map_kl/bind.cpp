#include "attention_map_kl/bind.h"

#include <pybind11/stl.h>

#include <array>

#include "attention_map_kl/attention_map_kl.h"

namespace py = pybind11;

namespace fastrec::attention_map_kl {

using Strided = std::array<int64_t, 5>;  // address, batch stride, head stride, row stride, dims

void bind(py::module_& parent) {
  py::module_ m = parent.def_submodule("attention_map_kl");
  m.def(
      "kernel_isa", [] { return kIsaTable[static_cast<int>(select().isa)].name; },
      "Name of the ISA whose kernel runs now.");
  m.def(
      "run",
      [](const Strided& teacher_q, const Strided& teacher_k, const Strided& student_q,
         const Strided& student_k, float teacher_scale, float student_scale, bool teacher_causal,
         uintptr_t kl, uintptr_t dq, uintptr_t dk, uintptr_t lengths, int64_t window, bool causal,
         uintptr_t distances, uintptr_t starts, int64_t batch, int64_t heads, int64_t length) {
        const auto rows = [](const Strided& s) {
          return Rows{reinterpret_cast<const float*>(s[0]), s[1], s[2], s[3], s[4]};
        };
        const auto floats = [](uintptr_t p) { return reinterpret_cast<float*>(p); };
        const auto ints = [](uintptr_t p) { return reinterpret_cast<const int64_t*>(p); };
        py::gil_scoped_release nogil;
        return run({rows(teacher_q),
                    rows(teacher_k),
                    rows(student_q),
                    rows(student_k),
                    teacher_scale,
                    student_scale,
                    teacher_causal,
                    floats(kl),
                    floats(dq),
                    floats(dk),
                    ints(lengths),
                    {window, causal, ints(distances), ints(starts)},
                    batch,
                    heads,
                    length});
      },
      "Addresses, strides in floats, sizes, checked by the caller; dq and dk 0: the value alone. "
      "The first bad length, or -1.");
}

}  // namespace fastrec::attention_map_kl
