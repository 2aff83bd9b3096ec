// Helpers of bind.cpp files: addresses from Python, and errors to it.
#pragma once

#include <cuda_runtime_api.h>
#include <pybind11/pybind11.h>

#include <cstdint>

namespace fastrec {

// Addresses cross the border as integers.
template <typename T>
T* pointer(uintptr_t address) {
  return reinterpret_cast<T*>(address);
}

inline cudaStream_t stream_of(uintptr_t handle) { return reinterpret_cast<cudaStream_t>(handle); }

// Raises fastrec.errors.CudaError where a call of CUDA failed.
inline void check(cudaError_t error, const char* what) {
  if (error == cudaSuccess) return;
  const pybind11::object type = pybind11::module_::import("fastrec.errors").attr("CudaError");
  const pybind11::tuple arguments =
      pybind11::make_tuple(what, static_cast<int>(error), cudaGetErrorString(error));
  PyErr_SetObject(type.ptr(), arguments.ptr());
  throw pybind11::error_already_set();
}

}  // namespace fastrec
