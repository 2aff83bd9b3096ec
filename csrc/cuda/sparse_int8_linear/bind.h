#pragma once

#include <pybind11/pybind11.h>

namespace fastrec::sparse_int8_linear {
void bind(pybind11::module_& parent);
}
