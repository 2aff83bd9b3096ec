#include "pointwise_attention/bind.h"

#include <pybind11/stl.h>

#include "pointwise_attention/pointwise_attention.h"

namespace py = pybind11;

namespace fastrec::pointwise_attention {
void bind(py::module_& parent) {
  py::module_ m = parent.def_submodule("pointwise_attention");
  m.attr("MAX_DIMS") = kMaxDims;
  m.attr("MAX_BUCKETS") = kMaxBuckets;
  m.def(
      "kernel_isa", [] { return kIsaTable[static_cast<int>(select().isa)].name; },
      "Name of the ISA whose kernel runs now.");
  m.def(
      "forward",
      [](const py::tuple& s, const py::tuple& b, float scale, float inverse_norm, bool causal,
         const py::tuple& q, const py::tuple& k, const py::tuple& v, const py::tuple& out) {
        const Call call{shape_of(s), bias_of(b), scale,      inverse_norm, causal,
                        view_of(q),  view_of(k), view_of(v), view_of(out)};
        py::gil_scoped_release nogil;
        return plain(forward(call));
      },
      "Views, shape and bias as tuples, checked by the caller. (what stopped it, at which entry), "
      "the first 0 where nothing did.");
  m.def("backward", [](const py::tuple& s, const py::tuple& b, float scale, float inverse_norm,
                       bool causal, const py::tuple& q, const py::tuple& k, const py::tuple& v,
                       const py::tuple& d_out, const py::tuple& dq, const py::tuple& dk,
                       const py::tuple& dv, uintptr_t d_position, uintptr_t d_time) {
    const Call call{shape_of(s), bias_of(b), scale,      inverse_norm, causal,
                    view_of(q),  view_of(k), view_of(v), View{}};
    const Gradients to{view_of(d_out),
                       view_of(dq),
                       view_of(dk),
                       view_of(dv),
                       reinterpret_cast<float*>(d_position),
                       reinterpret_cast<float*>(d_time)};
    py::gil_scoped_release nogil;
    return plain(backward(call, to));
  });
}

}  // namespace fastrec::pointwise_attention
