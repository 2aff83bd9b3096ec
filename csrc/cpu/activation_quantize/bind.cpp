#include "activation_quantize/bind.h"

#include "activation_quantize/activation_quantize.h"

namespace py = pybind11;

namespace fastrec::activation_quantize {

void bind(py::module_& parent) {
  py::module_ m = parent.def_submodule("activation_quantize");
  m.def(
      "kernel_isa", [] { return kIsaTable[static_cast<int>(select().isa)].name; },
      "Name of the ISA whose kernel runs now.");
  m.def(
      "run",
      [](uintptr_t x, int x_type, uintptr_t x_scale, uintptr_t bias, int activation, uintptr_t y,
         int y_type, float scale, int32_t zero_point, int64_t count, int64_t channels) {
        py::gil_scoped_release nogil;
        return run({reinterpret_cast<const void*>(x),
                    static_cast<Input>(x_type),
                    reinterpret_cast<const float*>(x_scale),
                    reinterpret_cast<const float*>(bias),
                    static_cast<Activation>(activation),
                    reinterpret_cast<void*>(y),
                    static_cast<Output>(y_type),
                    {scale, zero_point},
                    count,
                    channels});
      },
      "Addresses (0: none), enum values and sizes, checked by the caller. False if a NaN was to be "
      "quantised.");
}

}  // namespace fastrec::activation_quantize
