#include "engine/bind.h"

#include <pybind11/numpy.h>
#include <pybind11/stl.h>

#include <algorithm>
#include <stdexcept>

#include "engine/entrance.h"
#include "engine/executor.h"
#include "engine/map_ops.h"
#include "parallel.h"

namespace py = pybind11;

namespace fastrec::engine {
namespace {

// As Python writes them: [coefficient, exponent of symbol 0, ...].
using PyExtent = std::vector<int64_t>;
// space, index, dtype, offset, sizes, strides, bytes of a row's place in tiles
using PyOperand =
    std::tuple<int, int, int, int64_t, std::vector<PyExtent>, std::vector<PyExtent>, int64_t>;
// begin, end, symbol
using PyGroup = std::tuple<int, int, int>;
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
               const Executor* whole, const std::vector<int64_t>& origins, int users,
               const std::vector<PyExtent>& rows, const std::vector<PyGroup>& groups) {
  Plan plan;
  for (const auto& [begin, end, symbol] : groups) plan.groups.push_back({begin, end, symbol});
  plan.users = users;
  plan.rows = extents(rows);
  for (uintptr_t address : constants)
    plan.constants.push_back(reinterpret_cast<const std::byte*>(address));
  for (const auto& buffers : slots) plan.slots.push_back({extents(buffers)});
  for (const auto& [kind, operands, integers, numbers] : steps) {
    const Kind* known = find_kind(kind);
    if (!known) throw std::invalid_argument("unknown step kind " + kind);
    Step step{kind, known->run, {}, integers, numbers, nullptr};
    for (const auto& [space, index, dtype, offset, sizes, strides, tile_row] : operands) {
      if (sizes.size() > kMaxDims) throw std::invalid_argument("too many dimensions");
      step.operands.push_back({static_cast<Space>(space), index, static_cast<Dtype>(dtype), offset,
                               extents(sizes), extents(strides), tile_row});
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

// As Python writes them: (size, symbol), with -1 for no symbol.
using PySize = std::pair<int64_t, int>;
// dtype, dimensions, whether its values have a range, the range's top
using PyInput = std::tuple<int, std::vector<PySize>, bool, PySize>;

constexpr int kMaxInputs = 32;

// numpy's own number of a dtype, or -1.
int numpy_number(Dtype dtype) {
  switch (dtype) {
    case Dtype::f32:
      return py::dtype::of<float>().num();
    case Dtype::i64:
      return py::dtype::of<int64_t>().num();
    case Dtype::i32:
      return py::dtype::of<int32_t>().num();
    case Dtype::u8:
      return py::dtype::of<uint8_t>().num();
    case Dtype::s8:
      return py::dtype::of<int8_t>().num();
    case Dtype::b8:
      return py::dtype::of<bool>().num();
  }
  return -1;
}

// The calling thread's setting for the time of a call, which may throw.
struct CallThreads {
  explicit CallThreads(int threads) : before(exchange_call_threads(threads)) {}
  CallThreads(const CallThreads&) = delete;
  ~CallThreads() { exchange_call_threads(before); }

  const int before;
};

// A plan's executor and what it takes and gives.
class Door {
 public:
  Door(Executor& executor, const std::vector<PyInput>& inputs,
       const std::vector<std::pair<int64_t, int64_t>>& limits, const std::vector<PyExtent>& output)
      : executor_(executor), entrance_(made(inputs), ranges(limits)), output_(extents(output)) {
    if (inputs.size() > kMaxInputs) throw std::invalid_argument("too many inputs");
    if (limits.size() > kMaxSymbols) throw std::invalid_argument("too many symbols");
    for (const auto& [dtype, dims, checked, top] : inputs) {
      dtypes_.push_back(static_cast<Dtype>(dtype));
      numbers_.push_back(numpy_number(dtypes_.back()));
    }
  }

  // The scores; None where an input is not an array in order; (fault, step, value) of a step.
  py::object pass(const py::tuple& inputs, int threads) {
    Array arrays[kMaxInputs];
    const std::byte* addresses[kMaxInputs];
    if (inputs.size() != numbers_.size()) return py::none();
    for (size_t i = 0; i < numbers_.size(); ++i) {
      const py::handle given = inputs[i];
      if (!py::isinstance<py::array>(given)) return py::none();
      const auto array = py::reinterpret_borrow<py::array>(given);
      constexpr int kInOrder =
          py::detail::npy_api::NPY_ARRAY_C_CONTIGUOUS_ | py::detail::npy_api::NPY_ARRAY_ALIGNED_;
      const py::dtype dtype = array.dtype();
      if ((array.flags() & kInOrder) != kInOrder || dtype.num() != numbers_[i] ||
          dtype.byteorder() == '>')
        return py::none();
      addresses[i] = static_cast<const std::byte*>(array.data());
      arrays[i] = {addresses[i], dtypes_[i], static_cast<int>(array.ndim()), array.shape()};
    }
    Symbols symbols{};
    if (!entrance_.admits(arrays, symbols)) return py::none();
    std::vector<py::ssize_t> shape;
    for (const Extent& size : output_) shape.push_back(size.at(symbols));
    py::array_t<float> scores(shape);
    std::byte* const results[] = {reinterpret_cast<std::byte*>(scores.mutable_data())};
    Status status;
    {
      py::gil_scoped_release nogil;
      const CallThreads limit(threads);
      status = executor_.run(symbols, addresses, results);
    }
    if (status.fault == Fault::none) return scores;
    return py::make_tuple(static_cast<int>(status.fault), status.step, status.value);
  }

 private:
  static Size size(const PySize& from) { return {from.first, from.second}; }

  static std::vector<Input> made(const std::vector<PyInput>& from) {
    std::vector<Input> to;
    for (const auto& [dtype, dims, checked, top] : from) {
      Input input{static_cast<Dtype>(dtype), {}, checked, size(top)};
      for (const PySize& d : dims) input.dims.push_back(size(d));
      to.push_back(std::move(input));
    }
    return to;
  }

  static std::vector<Range> ranges(const std::vector<std::pair<int64_t, int64_t>>& from) {
    std::vector<Range> to;
    for (const auto& [low, high] : from) to.push_back({low, high});
    return to;
  }

  Executor& executor_;
  Entrance entrance_;
  std::vector<Extent> output_;
  std::vector<Dtype> dtypes_;
  std::vector<int> numbers_;
};

}  // namespace

void bind(py::module_& parent) {
  py::module_ m = parent.def_submodule("engine");
  m.attr("MAX_SYMBOLS") = kMaxSymbols;
  m.attr("MAX_DIMS") = kMaxDims;
  m.attr("MAX_OPERANDS") = kMaxOperands;
  m.attr("MAX_REGISTERS") = kMaxRegisters;
  m.attr("MAP_OPS") = std::vector<std::string>(kMapOpNames, kMapOpNames + kMapOps);
  py::class_<Executor>(m, "Executor")
      .def(py::init([](const std::vector<uintptr_t>& constants,
                       const std::vector<std::vector<PyExtent>>& slots,
                       const std::vector<PyStep>& steps, const Executor* whole,
                       const std::vector<int64_t>& origins, int users,
                       const std::vector<PyExtent>& rows, const std::vector<PyGroup>& groups) {
             return std::make_unique<Executor>(
                 make_plan(constants, slots, steps, whole, origins, users, rows, groups));
           }),
           py::arg("constants"), py::arg("slots"), py::arg("steps"), py::arg("whole") = nullptr,
           py::arg("origins") = std::vector<int64_t>{}, py::arg("users") = -1,
           py::arg("rows") = std::vector<PyExtent>{}, py::arg("groups") = std::vector<PyGroup>{},
           "Borrows the constants: the caller keeps them alive and has checked the plan. A part of "
           "a plan shares what `whole` has prepared: step i that of step origins[i], if not -1.")
      .def("run", run, py::arg("symbols"), py::arg("inputs"), py::arg("outputs"),
           py::arg("step_ns") = 0, "(fault, step, value); fault 0 is success.");
  py::class_<Door>(m, "Door")
      .def(py::init([](Executor& executor, const py::object&, const std::vector<PyInput>& inputs,
                       const std::vector<std::pair<int64_t, int64_t>>& limits,
                       const std::vector<PyExtent>& output) {
             return std::make_unique<Door>(executor, inputs, limits, output);
           }),
           py::keep_alive<1, 2>(), py::keep_alive<1, 3>(), py::arg("executor"),
           py::arg("constants"), py::arg("inputs"), py::arg("limits"), py::arg("output"))
      .def("__call__", &Door::pass, py::arg("inputs"), py::arg("threads"),
           "The scores; None where an input is not an array in order; else (fault, step, value).");
}

}  // namespace fastrec::engine
