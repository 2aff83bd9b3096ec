#pragma once

#include <pybind11/pybind11.h>

namespace fastrec::pointwise_attention {
void bind(pybind11::module_& parent);
}
