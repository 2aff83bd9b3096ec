#include "pointwise_attention/bind.h"

#include <pybind11/stl.h>

#include "pointwise_attention/pointwise_attention.h"

namespace py = pybind11;

namespace fastrec::pointwise_attention {
namespace {

// Tuples of integers, whose casts one by one would cost as much as the rest of the call.
int64_t number(const py::tuple& t, int i) {
  return PyLong_AsLongLong(PyTuple_GET_ITEM(t.ptr(), i));
}
template <class T>
T* address(const py::tuple& t, int i) {
  return reinterpret_cast<T*>(number(t, i));
}

// (address, batch stride, head stride, row stride)
View view(const py::tuple& t) {
  return {address<void>(t, 0), number(t, 1), number(t, 2), number(t, 3)};
}

// (dtype, B, H, rows, D, Dv, addresses of lengths, cu_seqlens and targets)
Shape shape(const py::tuple& t) {
  return {static_cast<Dtype>(number(t, 0)),
          number(t, 1),
          number(t, 2),
          number(t, 3),
          number(t, 4),
          number(t, 5),
          address<const int64_t>(t, 6),
          address<const int64_t>(t, 7),
          address<const int64_t>(t, 8)};
}

// (position, its stride, positions, time, its stride, buckets, edges, times, query times)
Bias bias(const py::tuple& t) {
  return {address<const float>(t, 0),
          number(t, 1),
          number(t, 2),
          address<const float>(t, 3),
          number(t, 4),
          number(t, 5),
          address<const int64_t>(t, 6),
          address<const int64_t>(t, 7),
          address<const int64_t>(t, 8)};
}

std::pair<int, int64_t> plain(const Result& result) {
  return {static_cast<int>(result.first), result.second};
}

}  // namespace

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
        const Call call{shape(s), bias(b), scale,   inverse_norm, causal,
                        view(q),  view(k), view(v), view(out)};
        py::gil_scoped_release nogil;
        return plain(forward(call));
      },
      "Views, shape and bias as tuples, checked by the caller. (what stopped it, at which entry), "
      "the first 0 where nothing did.");
  m.def("backward", [](const py::tuple& s, const py::tuple& b, float scale, float inverse_norm,
                       bool causal, const py::tuple& q, const py::tuple& k, const py::tuple& v,
                       const py::tuple& d_out, const py::tuple& dq, const py::tuple& dk,
                       const py::tuple& dv, uintptr_t d_position, uintptr_t d_time) {
    const Call call{shape(s), bias(b), scale,   inverse_norm, causal,
                    view(q),  view(k), view(v), View{}};
    const Gradients to{view(d_out),
                       view(dq),
                       view(dk),
                       view(dv),
                       reinterpret_cast<float*>(d_position),
                       reinterpret_cast<float*>(d_time)};
    py::gil_scoped_release nogil;
    return plain(backward(call, to));
  });
}

}  // namespace fastrec::pointwise_attention
