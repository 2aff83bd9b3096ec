#pragma once

#include <pybind11/pybind11.h>

namespace fastrec::separable_projection {
void bind(pybind11::module_& parent);
}
