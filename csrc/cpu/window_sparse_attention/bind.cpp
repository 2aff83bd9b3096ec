#include "window_sparse_attention/bind.h"

#include <pybind11/stl.h>

#include "window_sparse_attention/window_sparse_attention.h"

namespace py = pybind11;

namespace fastrec::window_sparse_attention {
namespace {

// Tuples of integers, whose casts one by one would cost as much as the rest of the call.
int64_t number(const py::tuple& t, int i) {
  return PyLong_AsLongLong(PyTuple_GET_ITEM(t.ptr(), i));
}

// (address, batch stride, head stride, row stride)
View view(const py::tuple& t) {
  return {reinterpret_cast<void*>(number(t, 0)), number(t, 1), number(t, 2), number(t, 3)};
}

// (dtype, B, H, rows, D, address of lengths, address of cu_seqlens)
Shape shape(const py::tuple& t) {
  const auto address = [&](int i) { return reinterpret_cast<const int64_t*>(number(t, i)); };
  return {static_cast<Dtype>(number(t, 0)),
          number(t, 1),
          number(t, 2),
          number(t, 3),
          number(t, 4),
          address(5),
          address(6)};
}

}  // namespace

void bind(py::module_& parent) {
  py::module_ m = parent.def_submodule("window_sparse_attention");
  m.attr("MAX_DIMS") = kMaxDims;
  m.def(
      "kernel_isa", [] { return kIsaTable[static_cast<int>(select().isa)].name; },
      "Name of the ISA whose kernel runs now.");
  py::class_<Pattern>(m, "Pattern", "Who sees whom, for sequences up to one length.")
      .def(py::init([](int64_t window, bool causal, std::vector<std::vector<int64_t>> distances) {
        return Pattern{window, causal, std::move(distances)};
      }))
      .def(
          "forward",
          [](const Pattern& pattern, float scale, const py::tuple& s, const py::tuple& q,
             const py::tuple& k, const py::tuple& v, const py::tuple& out, const py::tuple& lse) {
            const Forward call{shape(s), &pattern, scale,     view(q),
                               view(k),  view(v),  view(out), view(lse)};
            py::gil_scoped_release nogil;
            return window_sparse_attention::forward(call);
          },
          "Views and shape as tuples, checked by the caller. The first bad entry of lengths or "
          "cu_seqlens, or -1.")
      .def("backward",
           [](const Pattern& pattern, float scale, const py::tuple& s, const py::tuple& q,
              const py::tuple& k, const py::tuple& v, const py::tuple& out, const py::tuple& lse,
              const py::tuple& d_out, const py::tuple& d_lse, const py::tuple& dq,
              const py::tuple& dk, const py::tuple& dv, const py::tuple& delta) {
             const Backward call{shape(s), &pattern,  scale,     view(q),     view(k),
                                 view(v),  view(out), view(lse), view(d_out), view(d_lse),
                                 view(dq), view(dk),  view(dv),  view(delta)};
             py::gil_scoped_release nogil;
             return window_sparse_attention::backward(call);
           });
}

}  // namespace fastrec::window_sparse_attention
