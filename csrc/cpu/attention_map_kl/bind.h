#pragma once

#include <pybind11/pybind11.h>

namespace fastrec::attention_map_kl {
void bind(pybind11::module_& parent);
}
