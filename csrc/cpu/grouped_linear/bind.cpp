#include "grouped_linear/bind.h"

#include "grouped_linear/grouped_linear.h"

namespace py = pybind11;

namespace fastrec::grouped_linear {
namespace {

Matrix matrix(uintptr_t data, Dtype dtype, int64_t row_stride, int64_t groups, int64_t channels,
              bool shuffle) {
  return {reinterpret_cast<const void*>(data), dtype, row_stride,
          shuffle ? Channels{1, groups} : Channels{channels, 1}};
}

const void* pointer(uintptr_t address) { return reinterpret_cast<const void*>(address); }

}  // namespace

void bind(py::module_& parent) {
  py::module_ m = parent.def_submodule("grouped_linear");
  m.def(
      "kernel_isa",
      [](bool bf16) {
        return kIsaTable[static_cast<int>(select(bf16 ? Dtype::bf16 : Dtype::f32).isa)].name;
      },
      py::arg("bf16") = false, "Name of the ISA whose kernel runs now for this dtype.");
  m.def(
      "forward",
      [](uintptr_t x, int64_t x_row, uintptr_t weight, uintptr_t bias, uintptr_t y, bool bf16,
         bool shuffle, int64_t rows, int64_t groups, int64_t outputs, int64_t inputs) {
        const Dtype dtype = bf16 ? Dtype::bf16 : Dtype::f32;
        py::gil_scoped_release nogil;
        forward(matrix(x, dtype, x_row, groups, inputs, false), pointer(weight), pointer(bias),
                matrix(y, dtype, groups * outputs, groups, outputs, shuffle),
                {rows, groups, outputs, inputs});
      },
      "Addresses, row stride in elements, sizes, checked by the caller.");
  m.def(
      "backward",
      [](uintptr_t dy, int64_t dy_row, uintptr_t x, int64_t x_row, uintptr_t weight, uintptr_t dx,
         uintptr_t dweight, uintptr_t dbias, bool bf16, bool shuffle, int64_t rows, int64_t groups,
         int64_t outputs, int64_t inputs, bool wants_x, bool wants_weight) {
        const Dtype dtype = bf16 ? Dtype::bf16 : Dtype::f32;
        const Sizes sizes = {rows, groups, outputs, inputs};
        const Matrix dy_matrix = matrix(dy, dtype, dy_row, groups, outputs, shuffle);
        py::gil_scoped_release nogil;
        if (wants_x)
          input_gradient(dy_matrix, pointer(weight),
                         matrix(dx, dtype, groups * inputs, groups, inputs, false), sizes);
        if (wants_weight)
          weight_gradient(dy_matrix, matrix(x, dtype, x_row, groups, inputs, false),
                          reinterpret_cast<void*>(dweight), reinterpret_cast<void*>(dbias), sizes);
      },
      "The same; dbias may be 0: not wanted; it comes with dweight.");
}

}  // namespace fastrec::grouped_linear
