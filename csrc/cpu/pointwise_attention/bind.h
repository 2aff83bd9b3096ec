#pragma once

#include <pybind11/pybind11.h>

#include "pointwise_attention/pointwise_attention.h"

namespace fastrec::pointwise_attention {

// Tuples of integers, whose casts one by one would cost as much as the rest of the call.
inline int64_t number(const pybind11::tuple& t, int i) {
  return PyLong_AsLongLong(PyTuple_GET_ITEM(t.ptr(), i));
}
template <class T>
T* address(const pybind11::tuple& t, int i) {
  return reinterpret_cast<T*>(number(t, i));
}

// (address, batch stride, head stride, row stride)
inline View view_of(const pybind11::tuple& t) {
  return {address<void>(t, 0), number(t, 1), number(t, 2), number(t, 3)};
}

// (dtype, B, H, rows, D, Dv, addresses of lengths, cu_seqlens and targets)
inline Shape shape_of(const pybind11::tuple& t) {
  return {static_cast<Dtype>(number(t, 0)),
          number(t, 1),
          number(t, 2),
          number(t, 3),
          number(t, 4),
          number(t, 5),
          address<const int64_t>(t, 6),
          address<const int64_t>(t, 7),
          address<const int64_t>(t, 8)};
}

// (position, its stride, positions, time, its stride, buckets, edges, times, query times)
inline Bias bias_of(const pybind11::tuple& t) {
  return {address<const float>(t, 0),
          number(t, 1),
          number(t, 2),
          address<const float>(t, 3),
          number(t, 4),
          number(t, 5),
          address<const int64_t>(t, 6),
          address<const int64_t>(t, 7),
          address<const int64_t>(t, 8)};
}

inline std::pair<int, int64_t> plain(const Result& result) {
  return {static_cast<int>(result.first), result.second};
}

void bind(pybind11::module_& parent);

}  // namespace fastrec::pointwise_attention
