#include "pointwise_attention_int8/bind.h"

#include <pybind11/stl.h>

#include "pointwise_attention/bind.h"
#include "pointwise_attention_int8/pointwise_attention_int8.h"

namespace py = pybind11;

namespace fastrec::pointwise_attention_int8 {

void bind(py::module_& parent) {
  py::module_ m = parent.def_submodule("pointwise_attention_int8");
  m.def(
      "kernel_isa", [] { return kIsaTable[static_cast<int>(select().isa)].name; },
      "Name of the ISA whose kernel runs now.");
  m.def(
      "forward",
      [](const py::tuple& s, const py::tuple& b, float score_scale, float out_scale, bool causal,
         const py::tuple& q, const py::tuple& k, const py::tuple& v, const py::tuple& out) {
        using namespace pointwise_attention;
        const pointwise_attention_int8::Call call{shape_of(s), bias_of(b), score_scale,
                                                  out_scale,   causal,     view_of(q),
                                                  view_of(k),  view_of(v), view_of(out)};
        py::gil_scoped_release nogil;
        return plain(pointwise_attention_int8::forward(call));
      },
      "Views, shape and bias as tuples, checked by the caller. (what stopped it, at which entry), "
      "the first 0 where nothing did.");
}

}  // namespace fastrec::pointwise_attention_int8
