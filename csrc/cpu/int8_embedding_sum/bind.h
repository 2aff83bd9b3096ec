#pragma once

#include <pybind11/pybind11.h>

namespace fastrec::int8_embedding_sum {
void bind(pybind11::module_& parent);
}
