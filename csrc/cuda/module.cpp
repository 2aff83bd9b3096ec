// The Python module fastrec._native_cuda: one line per op. It imports where no driver is; a launch
// there raises fastrec.errors.CudaError.
#include <pybind11/pybind11.h>

#include "bind.h"
#include "sparse_int8_linear/bind.h"

namespace py = pybind11;
using namespace fastrec;

PYBIND11_MODULE(_native_cuda, m) {
  m.doc() = "Compiled CUDA kernels of fastrec.";
  m.def(
      "runtime_version",
      [] {
        int version = 0;
        check(cudaRuntimeGetVersion(&version), "runtime_version");
        return version;
      },
      "CUDA's version that this module was built with: 1000 * major + 10 * minor.");
  m.def(
      "device_count",
      [] {
        int count = 0;
        check(cudaGetDeviceCount(&count), "device_count");
        return count;
      },
      "GPUs that CUDA sees; raises CudaError without a driver.");

  sparse_int8_linear::bind(m);
}
