#include "sparse_int8_linear/bind.h"

#include <pybind11/stl.h>

#include <array>
#include <string_view>
#include <vector>

#include "../bind.h"
#include "sparse_int8_linear/launch.h"

namespace fastrec::sparse_int8_linear {

void bind(pybind11::module_& parent) {
  pybind11::module_ m = parent.def_submodule("sparse_int8_linear");
  m.attr("params_bytes") = sizeof(Params);
  m.def(
      "configurations",
      [] {
        std::vector<std::array<int, 7>> found;
        for (int i = 0; i < configurations(); ++i) {
          const Configuration c = configuration(i);
          found.push_back({c.rows, c.wide, c.panels, c.slices, c.ahead, c.bands, c.two_four});
        }
        return found;
      },
      "What is compiled, (rows, wide, panels, slices, ahead, bands, two_four) each.");
  m.def("shared_bytes", &shared_bytes);
  m.def(
      "launch",
      [](int index, pybind11::buffer params, uintptr_t stream) {
        const pybind11::buffer_info info = params.request();
        check(info.size * info.itemsize == sizeof(Params) ? cudaSuccess : cudaErrorInvalidValue,
              "sparse_int8_linear's parameters");
        check(launch(index, *static_cast<const Params*>(info.ptr), stream_of(stream)),
              "sparse_int8_linear");
      },
      "Launches the configuration of that index with a Params structure, on a stream.");
}

}  // namespace fastrec::sparse_int8_linear
