#pragma once

#include <pybind11/pybind11.h>

namespace fastrec::pointwise_attention_int8 {
void bind(pybind11::module_& parent);
}
