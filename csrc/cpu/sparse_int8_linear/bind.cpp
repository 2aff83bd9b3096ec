#include "sparse_int8_linear/bind.h"

#include <pybind11/pybind11.h>

#include <memory>

#include "sparse_int8_linear/sparse_int8_linear.h"

namespace py = pybind11;

namespace fastrec::sparse_int8_linear {
namespace {

template <class T>
T* pointer(uintptr_t address) {
  return reinterpret_cast<T*>(address);
}

// A weight with its quantisation and epilogue, ready to run. It borrows every pointer: the Python
// owner keeps the tensors alive and unchanged and has checked shapes, dtypes, devices and
// contiguity.
class Prepared {
 public:
  Prepared(uintptr_t values, uintptr_t group_index, uintptr_t panel_start, uintptr_t scale,
           uintptr_t sum, uintptr_t bias, int64_t outputs, int64_t inputs, float x_scale,
           int32_t x_zero_point, int activation, int y_dtype, float y_scale, int32_t y_zero_point) {
    call_.weight = {pointer<const int8_t>(values),
                    pointer<const int32_t>(group_index),
                    pointer<const int32_t>(panel_start),
                    pointer<const float>(scale),
                    pointer<const int32_t>(sum),
                    pointer<const float>(bias),
                    outputs,
                    inputs};
    call_.x_quantisation = {x_scale, x_zero_point};
    folding_ = std::make_unique<Folding>(call_.weight, call_.x_quantisation);
    call_.folded = folding_->folded();
    call_.activation = static_cast<Activation>(activation);
    call_.y_dtype = static_cast<Dtype>(y_dtype);
    call_.y_quantisation = {y_scale, y_zero_point};
  }

  bool run(uintptr_t x, int x_dtype, int64_t elements, uintptr_t y) const {
    Call call = call_;
    call.x = pointer<const void>(x);
    call.x_dtype = static_cast<Dtype>(x_dtype);
    call.rows = elements / call.weight.inputs;
    call.y = pointer<void>(y);
    py::gil_scoped_release nogil;
    return sparse_int8_linear::run(call);
  }

 private:
  Call call_{};
  std::unique_ptr<Folding> folding_;
};

}  // namespace

void bind(py::module_& parent) {
  py::module_ m = parent.def_submodule("sparse_int8_linear");
  m.attr("MAX_INPUTS") = kMaxInputs;
  m.attr("MAX_TILE_ROWS") = kMaxTileRows;
  m.def(
      "kernel_isa", [] { return kIsaTable[static_cast<int>(select().isa)].name; },
      "Name of the ISA whose kernel runs now.");
  py::class_<Prepared>(m, "Prepared")
      .def(py::init<uintptr_t, uintptr_t, uintptr_t, uintptr_t, uintptr_t, uintptr_t, int64_t,
                    int64_t, float, int32_t, int, int, float, int32_t>(),
           py::arg("values"), py::arg("group_index"), py::arg("panel_start"), py::arg("scale"),
           py::arg("sum"), py::arg("bias"), py::arg("outputs"), py::arg("inputs"),
           py::arg("x_scale"), py::arg("x_zero_point"), py::arg("activation"), py::arg("y_dtype"),
           py::arg("y_scale"), py::arg("y_zero_point"))
      .def("run", &Prepared::run,
           "`elements` of x and their dtype; false if a float input held a NaN.");
}

}  // namespace fastrec::sparse_int8_linear
