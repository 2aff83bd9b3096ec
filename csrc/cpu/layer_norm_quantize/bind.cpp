#include "layer_norm_quantize/bind.h"

#include "layer_norm_quantize/layer_norm_quantize.h"

namespace py = pybind11;

namespace fastrec::layer_norm_quantize {

void bind(py::module_& parent) {
  py::module_ m = parent.def_submodule("layer_norm_quantize");
  m.def(
      "kernel_isa", [] { return kIsaTable[static_cast<int>(select().isa)].name; },
      "Name of the ISA whose kernel runs now.");
  m.def(
      "run",
      [](uintptr_t x, uintptr_t residual, uintptr_t weight, uintptr_t bias, uintptr_t sum,
         uintptr_t y, bool y_u8, float scale, int32_t zero_point, float eps, int64_t rows,
         int64_t dims) {
        const auto floats = [](uintptr_t p) { return reinterpret_cast<float*>(p); };
        py::gil_scoped_release nogil;
        return run({floats(x),
                    floats(residual),
                    floats(weight),
                    floats(bias),
                    floats(sum),
                    reinterpret_cast<void*>(y),
                    y_u8,
                    {scale, zero_point},
                    eps,
                    rows,
                    dims});
      },
      "Addresses (0: none) and sizes, checked by the caller. False if a NaN was to be quantised.");
}

}  // namespace fastrec::layer_norm_quantize
