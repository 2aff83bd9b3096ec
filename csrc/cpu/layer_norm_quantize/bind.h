#pragma once

#include <pybind11/pybind11.h>

namespace fastrec::layer_norm_quantize {
void bind(pybind11::module_& parent);
}
