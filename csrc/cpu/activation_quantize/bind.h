#pragma once

#include <pybind11/pybind11.h>

namespace fastrec::activation_quantize {
void bind(pybind11::module_& parent);
}
