// The Python module fastrec._native: one line per op, plus the machine's features and limits.
#include <pybind11/pybind11.h>
#include <pybind11/stl.h>

#include <string>
#include <vector>

#include "activation_quantize/bind.h"
#include "attention_map_kl/bind.h"
#include "ceilings.h"
#include "cpu_features.h"
#include "engine/bind.h"
#include "grouped_linear/bind.h"
#include "int8_embedding/bind.h"
#include "layer_norm_quantize/bind.h"
#include "padded_attention/bind.h"
#include "parallel.h"
#include "pointwise_attention/bind.h"
#include "pointwise_attention_int8/bind.h"
#include "separable_projection/bind.h"
#include "sparse_int8_linear/bind.h"
#include "window_sparse_attention/bind.h"
#include "window_sparse_attention_int8/bind.h"

namespace py = pybind11;
using namespace fastrec;

namespace {

const IsaInfo* find_isa(const std::string& name) {
  for (const IsaInfo& info : kIsaTable)
    if (name == info.name) return &info;
  return nullptr;
}

std::vector<std::string> isa_names() {
  std::vector<std::string> names;
  for (const IsaInfo& info : kIsaTable) names.emplace_back(info.name);
  return names;
}

}  // namespace

PYBIND11_MODULE(_native, m) {
  m.doc() = "Compiled CPU kernels of fastrec.";

  m.def("isa_names", isa_names, "Every instruction set fastrec knows, oldest first.");
  m.def("isa_target", [](const std::string& name) { return std::string(find_isa(name)->target); });
  m.def("active_isa", [] { return kIsaTable[static_cast<int>(active_isa())].name; });
  m.def(
      "machine_has",
      [](const std::string& name) {
        const IsaInfo* info = find_isa(name);
        return info && machine_has(info->isa);
      },
      "Whether this CPU and its operating system can run that instruction set.");
  m.def(
      "force_isa",
      [](const std::string& name) {
        const IsaInfo* info = find_isa(name);
        if (!info || !machine_has(info->isa)) return false;
        force_isa(info->isa);
        return true;
      },
      "False (and nothing changes) if the name is unknown or the machine lacks it.");
  m.def(
      "supports",
      [](const std::string& target, uint32_t max_leaf, uint32_t leaf1_ecx, uint32_t leaf7_ebx,
         uint32_t leaf7_ecx, uint32_t leaf7_1_eax, uint64_t xcr0) {
        return supports({max_leaf, leaf1_ecx, leaf7_ebx, leaf7_ecx, leaf7_1_eax, xcr0}, target);
      },
      py::kw_only(), py::arg("target"), py::arg("max_leaf"), py::arg("leaf1_ecx"),
      py::arg("leaf7_ebx"), py::arg("leaf7_ecx"), py::arg("leaf7_1_eax"), py::arg("xcr0"),
      "Detection as a pure function of the CPUID and XCR0 words.");
  m.def("cpu_words", [] {
    const CpuWords w = read_cpu_words();
    py::dict words;
    words["max_leaf"] = w.max_leaf;
    words["leaf1_ecx"] = w.leaf1_ecx;
    words["leaf7_ebx"] = w.leaf7_ebx;
    words["leaf7_ecx"] = w.leaf7_ecx;
    words["leaf7_1_eax"] = w.leaf7_1_eax;
    words["xcr0"] = w.xcr0;
    return words;
  });

  m.def("num_threads", num_threads);
  m.def("set_num_threads", set_num_threads, "The process's setting; 0 forgets it.");
  m.def("exchange_call_threads", exchange_call_threads,
        "The calling thread's setting, which outranks the process's; 0: none. Returns the last.");
  m.def(
      "follow_threads",
      [](uintptr_t address) { follow_threads(reinterpret_cast<ThreadSource>(address)); },
      "Address of an `int (*)()` that calls ask where nothing is set; 0: none.");
  m.def("max_threads", max_threads);
  m.def("fma_peak_gflops", fma_peak_gflops, py::call_guard<py::gil_scoped_release>());
  m.def("bf16_peak_gflops", bf16_peak_gflops, py::call_guard<py::gil_scoped_release>());
  m.def("vpdpbusd_peak_gops", vpdpbusd_peak_gops, py::call_guard<py::gil_scoped_release>());
  m.def("read_bandwidth_gbs", read_bandwidth_gbs, py::arg("buffer_bytes"), py::arg("seconds"),
        py::call_guard<py::gil_scoped_release>(),
        "10^9 bytes a second that one core reads from a buffer of that size.");

  activation_quantize::bind(m);
  attention_map_kl::bind(m);
  engine::bind(m);
  grouped_linear::bind(m);
  int8_embedding::bind(m);
  layer_norm_quantize::bind(m);
  padded_attention::bind(m);
  pointwise_attention::bind(m);
  pointwise_attention_int8::bind(m);
  separable_projection::bind(m);
  sparse_int8_linear::bind(m);
  window_sparse_attention::bind(m);
  window_sparse_attention_int8::bind(m);
}
