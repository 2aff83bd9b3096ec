#pragma once

#include <pybind11/pybind11.h>

namespace fastrec::padded_attention {
void bind(pybind11::module_& parent);
}
