#pragma once

#include <pybind11/pybind11.h>

namespace fastrec::engine {
void bind(pybind11::module_& parent);
}
