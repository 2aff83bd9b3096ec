#include "engine/bind.h"

#include <pybind11/stl.h>

#include <stdexcept>

#include "engine/executor.h"
#include "engine/map_ops.h"

namespace py = pybind11;

namespace fastrec::engine {
namespace {

// As Python writes them: [coefficient, exponent of symbol 0, ...].
using PyExtent = std::vector<int64_t>;
// space, index, dtype, offset, sizes, strides
using PyOperand = std::tuple<int, int, int, int64_t, std::vector<PyExtent>, std::vector<PyExtent>>;
using PyStep =
    std::tuple<std::string, std::vector<PyOperand>, std::vector<int64_t>, std::vector<double>>;

Extent extent(const PyExtent& from) {
  Extent to;
  to.coefficient = from.at(0);
  for (int s = 0; s < kMaxSymbols; ++s) to.exponent[s] = static_cast<uint8_t>(from.at(s + 1));
  return to;
}

std::vector<Extent> extents(const std::vector<PyExtent>& from) {
  std::vector<Extent> to;
  for (const PyExtent& e : from) to.push_back(extent(e));
  return to;
}

Plan make_plan(const std::vector<uintptr_t>& constants,
               const std::vector<std::vector<PyExtent>>& slots, const std::vector<PyStep>& steps,
               const Executor* whole, const std::vector<int64_t>& origins) {
  Plan plan;
  for (uintptr_t address : constants)
    plan.constants.push_back(reinterpret_cast<const std::byte*>(address));
  for (const auto& buffers : slots) plan.slots.push_back({extents(buffers)});
  for (const auto& [kind, operands, integers, numbers] : steps) {
    const Kind* known = find_kind(kind);
    if (!known) throw std::invalid_argument("unknown step kind " + kind);
    Step step{kind, known->run, {}, integers, numbers, nullptr};
    for (const auto& [space, index, dtype, offset, sizes, strides] : operands) {
      if (sizes.size() > kMaxDims) throw std::invalid_argument("too many dimensions");
      step.operands.push_back({static_cast<Space>(space), index, static_cast<Dtype>(dtype), offset,
                               extents(sizes), extents(strides)});
    }
    if (step.operands.size() > kMaxOperands) throw std::invalid_argument("too many operands");
    const size_t position = plan.steps.size();
    if (whole && position < origins.size() && origins[position] >= 0)
      step.prepared = whole->plan().steps.at(origins[position]).prepared;
    plan.steps.push_back(std::move(step));
  }
  return plan;
}

py::tuple run(Executor& executor, const std::vector<int64_t>& sizes,
              const std::vector<uintptr_t>& inputs, const std::vector<uintptr_t>& outputs,
              uintptr_t step_ns) {
  Symbols symbols{};
  std::copy(sizes.begin(), sizes.begin() + std::min<size_t>(sizes.size(), kMaxSymbols),
            symbols.begin());
  Status status;
  {
    py::gil_scoped_release nogil;
    status = executor.run(symbols, reinterpret_cast<const std::byte* const*>(inputs.data()),
                          reinterpret_cast<std::byte* const*>(outputs.data()),
                          reinterpret_cast<int64_t*>(step_ns));
  }
  return py::make_tuple(static_cast<int>(status.fault), status.step, status.value);
}

}  // namespace

void bind(py::module_& parent) {
  py::module_ m = parent.def_submodule("engine");
  m.attr("MAX_SYMBOLS") = kMaxSymbols;
  m.attr("MAX_DIMS") = kMaxDims;
  m.attr("MAX_OPERANDS") = kMaxOperands;
  m.attr("MAX_REGISTERS") = kMaxRegisters;
  m.attr("SLACK") = kSlack;
  m.attr("MAP_OPS") = std::vector<std::string>(kMapOpNames, kMapOpNames + kMapOps);
  py::class_<Executor>(m, "Executor")
      .def(py::init([](const std::vector<uintptr_t>& constants,
                       const std::vector<std::vector<PyExtent>>& slots,
                       const std::vector<PyStep>& steps, const Executor* whole,
                       const std::vector<int64_t>& origins) {
             return std::make_unique<Executor>(make_plan(constants, slots, steps, whole, origins));
           }),
           py::arg("constants"), py::arg("slots"), py::arg("steps"), py::arg("whole") = nullptr,
           py::arg("origins") = std::vector<int64_t>{},
           "Borrows the constants: the caller keeps them alive and has checked the plan. A part of "
           "a plan shares what `whole` has prepared: step i that of step origins[i], if not -1.")
      .def("run", run, py::arg("symbols"), py::arg("inputs"), py::arg("outputs"),
           py::arg("step_ns") = 0, "(fault, step, value); fault 0 is success.");
}

}  // namespace fastrec::engine
