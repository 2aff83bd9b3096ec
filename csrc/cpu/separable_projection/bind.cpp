#include "separable_projection/bind.h"

#include "separable_projection/separable_projection.h"

namespace py = pybind11;

namespace fastrec::separable_projection {
namespace {

template <class T = void>
T* pointer(uintptr_t address) {
  return reinterpret_cast<T*>(address);
}

Dtype dtype_of(bool bf16) { return bf16 ? Dtype::bf16 : Dtype::f32; }

Shape shape_of(uintptr_t lengths, int64_t batch, int64_t length, int64_t channels, int width,
               int before) {
  return {batch, length, channels, width, before, pointer<const int64_t>(lengths)};
}

}  // namespace

void bind(py::module_& parent) {
  py::module_ m = parent.def_submodule("separable_projection");
  m.attr("MAX_WIDTH") = kMaxWidth;
  m.def(
      "kernel_isa", [] { return kIsaTable[static_cast<int>(select().isa)].name; },
      "Name of the ISA whose kernel runs now.");
  m.def(
      "forward",
      [](uintptr_t x, int64_t x_batch, int64_t x_row, uintptr_t depthwise, uintptr_t pointwise,
         uintptr_t bias, uintptr_t y, bool bf16, uintptr_t lengths, int64_t batch, int64_t length,
         int64_t channels, int width, int before, int64_t groups, int64_t outputs) {
        py::gil_scoped_release nogil;
        return forward({pointer(x), dtype_of(bf16), x_batch, x_row}, pointer(depthwise),
                       pointer(pointwise), pointer(bias), pointer(y),
                       shape_of(lengths, batch, length, channels, width, before), groups, outputs);
      },
      "Addresses, strides in elements, sizes, checked by the caller. The first bad length, or -1.");
  m.def(
      "backward",
      [](uintptr_t dy, uintptr_t x, int64_t x_batch, int64_t x_row, uintptr_t depthwise,
         uintptr_t pointwise, uintptr_t h, uintptr_t dh, uintptr_t dx, uintptr_t ddepthwise,
         uintptr_t dpointwise, uintptr_t dbias, bool bf16, uintptr_t lengths, int64_t batch,
         int64_t length, int64_t channels, int width, int before, int64_t groups, int64_t outputs) {
        const Dtype dtype = dtype_of(bf16);
        const Shape shape = shape_of(lengths, batch, length, channels, width, before);
        Shape back = shape;
        back.before = width - 1 - before;
        const Sequences sequences = {pointer(x), dtype, x_batch, x_row};
        const int64_t inputs = channels / groups;
        const grouped_linear::Sizes sizes = {batch * length, groups, outputs, inputs};
        const grouped_linear::Matrix dy_matrix = {
            pointer(dy), dtype, groups * outputs, {outputs, 1}};
        const auto f32_rows = [&](uintptr_t rows) {
          return grouped_linear::Matrix{pointer(rows), Dtype::f32, channels, {inputs, 1}};
        };
        py::gil_scoped_release nogil;
        if (dpointwise) {
          convolve(sequences, pointer(depthwise), dtype, false, pointer(h), Dtype::f32, shape);
          grouped_linear::weight_gradient(dy_matrix, f32_rows(h), pointer(dpointwise),
                                          pointer(dbias), sizes);
        }
        if (!dx && !ddepthwise) return;
        grouped_linear::input_gradient(dy_matrix, pointer(pointwise), f32_rows(dh), sizes);
        if (dx)
          convolve({pointer(dh), Dtype::f32, length * channels, channels}, pointer(depthwise),
                   dtype, true, pointer(dx), dtype, back);
        if (ddepthwise)
          depthwise_gradient(pointer<const float>(dh), sequences, pointer(ddepthwise), dtype,
                             shape);
      },
      "dy [B, L, G * O] contiguous, zero beyond the lengths; h, dh f32 [B, L, C] for working; "
      "gradients that are 0 are not wanted (dbias comes with dpointwise). Lengths are not "
      "checked.");
}

}  // namespace fastrec::separable_projection
