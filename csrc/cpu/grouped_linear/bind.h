#pragma once

#include <pybind11/pybind11.h>

namespace fastrec::grouped_linear {
void bind(pybind11::module_& parent);
}
