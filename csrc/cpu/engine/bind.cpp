#include "engine/bind.h"

#include <pybind11/numpy.h>
#include <pybind11/stl.h>

#include <cstring>
#include <new>
#include <optional>

#include "engine/cost.h"
#include "engine/file.h"
#include "engine/map_ops.h"
#include "engine/steps/pattern.h"
#include "engine/user_state.h"

namespace py = pybind11;

namespace fastrec::engine {
namespace {

constexpr std::align_val_t kLine{64};

// numpy's own number of a dtype.
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
      break;
  }
  return py::dtype::of<bool>().num();
}

// The inputs of a call where each is a contiguous numpy array of its field's dtype.
std::optional<std::vector<Array>> arrays_of(const InputSpec& spec, const py::tuple& inputs) {
  if (inputs.size() != spec.fields.size()) return std::nullopt;
  std::vector<Array> arrays;
  arrays.reserve(inputs.size());
  for (size_t i = 0; i < inputs.size(); ++i) {
    const py::handle given = inputs[i];
    if (!py::isinstance<py::array>(given)) return std::nullopt;
    const auto array = py::reinterpret_borrow<py::array>(given);
    constexpr int kInOrder =
        py::detail::npy_api::NPY_ARRAY_C_CONTIGUOUS_ | py::detail::npy_api::NPY_ARRAY_ALIGNED_;
    const py::dtype dtype = array.dtype();
    if ((array.flags() & kInOrder) != kInOrder || dtype.byteorder() == '>' ||
        dtype.num() != numpy_number(spec.fields[i].dtype))
      return std::nullopt;
    arrays.push_back({static_cast<const std::byte*>(array.data()), spec.fields[i].dtype,
                      static_cast<int>(array.ndim()), array.shape()});
  }
  return arrays;
}

// A read-only array of memory that `owner` keeps.
py::array read_only(const py::dtype& dtype, const std::vector<int64_t>& sizes, const void* data,
                    const py::handle& owner) {
  py::array array(dtype, sizes, data, owner);
  py::detail::array_proxy(array.ptr())->flags &= ~py::detail::npy_api::NPY_ARRAY_WRITEABLE_;
  return array;
}

py::array values_of(const SharedValues& values) {
  const auto free = [](void* held) { delete static_cast<SharedValues*>(held); };
  const py::capsule owner(new SharedValues(values), free);
  return read_only(py::dtype(numpy_number(values->dtype)), values->sizes, values->data(), owner);
}

// An engine as Python holds it: the header and the constants come back when it is saved.
struct BoundEngine {
  std::string header;
  std::shared_ptr<Engine> engine;
};

std::unique_ptr<BoundEngine> build(std::string header, const std::vector<py::array>& constants) {
  const json::Value value = json::parse(header);
  std::vector<std::shared_ptr<std::byte>> memory;
  std::vector<Constant> copies;
  for (const py::array& array : constants) {
    if (!(array.flags() & py::array::c_style))
      throw std::invalid_argument("constants: expected contiguous arrays");
    const size_t bytes = static_cast<size_t>(array.nbytes());
    memory.emplace_back(new (kLine) std::byte[std::max<size_t>(bytes, 1)],
                        [](std::byte* m) { ::operator delete[](m, kLine); });
    std::memcpy(memory.back().get(), array.data(), bytes);
    copies.push_back({memory.back().get(), static_cast<int64_t>(bytes)});
  }
  auto held = std::make_shared<std::vector<std::shared_ptr<std::byte>>>(std::move(memory));
  auto engine = std::make_shared<Engine>(value, std::move(copies), std::move(held));
  return std::make_unique<BoundEngine>(BoundEngine{std::move(header), std::move(engine)});
}

std::unique_ptr<BoundEngine> open(const std::string& path, bool copy) {
  OpenedFile file = open_file(path, copy ? Keep::copied : Keep::mapped);
  return std::make_unique<BoundEngine>(
      BoundEngine{std::move(file.header), std::shared_ptr<Engine>(std::move(file.engine))});
}

py::list constants_of(const py::object& self) {
  py::list arrays;
  for (const Constant& constant : self.cast<BoundEngine&>().engine->program().constants)
    arrays.append(read_only(py::dtype::of<uint8_t>(), {constant.bytes}, constant.data, self));
  return arrays;
}

// New arrays for an engine's outputs, and where they lie.
struct Outputs {
  Outputs(const Engine& engine, const SpecSizes& sizes) : arrays(engine.program().outputs.size()) {
    const Program& program = engine.program();
    for (size_t i = 0; i < arrays.size(); ++i) {
      const Dtype dtype = program.buffers[program.outputs[i].buffer].dtype;
      py::array array(py::dtype(numpy_number(dtype)), engine.output_sizes(sizes, i));
      addresses[i] = static_cast<std::byte*>(array.mutable_data());
      arrays[i] = std::move(array);
    }
  }

  py::tuple arrays;
  std::byte* addresses[kMaxOperands];
};

// The output, or a tuple of them; None where the inputs are not arrays in order.
py::object call(BoundEngine& self, const py::tuple& inputs, int threads) {
  Engine& engine = *self.engine;
  const auto arrays = arrays_of(engine.inputs(), inputs);
  SpecSizes sizes = unknown_sizes();
  if (!arrays || !engine.inputs().admits(arrays->data(), sizes)) return py::none();
  Outputs outputs(engine, sizes);
  {
    py::gil_scoped_release nogil;
    engine.run(arrays->data(), sizes, outputs.addresses, threads);
  }
  if (outputs.arrays.size() == 1) return outputs.arrays[0];
  return std::move(outputs.arrays);
}

// A row a step: what it costs on these inputs, and its time in each of `calls` calls.
py::object profiled(BoundEngine& self, const py::tuple& inputs, int calls, int threads) {
  Engine& engine = *self.engine;
  const auto arrays = arrays_of(engine.inputs(), inputs);
  SpecSizes sizes = unknown_sizes();
  if (!arrays || !engine.inputs().admits(arrays->data(), sizes)) return py::none();
  const std::vector<ProgramStep>& steps = engine.program().steps;
  std::vector<int64_t> ns(steps.size() * calls);
  const Outputs outputs(engine, sizes);
  {
    py::gil_scoped_release nogil;
    for (int c = 0; c < calls; ++c)
      engine.run(arrays->data(), sizes, outputs.addresses, threads, ns.data() + c * steps.size());
  }
  std::vector<const std::byte*> addresses;
  for (const Array& array : *arrays) addresses.push_back(array.data);
  py::list rows;
  for (size_t s = 0; s < steps.size(); ++s) {
    const StepCost of = cost_of(engine.program(), steps[s], symbols_of(sizes), addresses.data());
    py::list times;
    for (int c = 0; c < calls; ++c) times.append(ns[c * steps.size() + s]);
    py::dict row;
    row["module"] = steps[s].module;
    row["op"] = of.shown;
    row["isa"] = of.isa ? py::object(py::str(of.isa)) : py::none();
    row["bytes"] = of.bytes;
    row["constant_bytes"] = of.cost.constant_bytes;
    row["activation_bytes"] = of.cost.activation_bytes;
    row["written_bytes"] = of.cost.written_bytes;
    row["macs"] = of.cost.macs;
    row["peak"] = of.cost.peak;
    row["density"] = of.cost.density;
    row["ns"] = times;
    rows.append(row);
  }
  return rows;
}

py::object encode(const SplitExecutors& self, const py::tuple& inputs, int threads) {
  const auto arrays = arrays_of(self.history_inputs(), inputs);
  SpecSizes sizes = unknown_sizes();
  if (!arrays || !self.history_inputs().admits(arrays->data(), sizes)) return py::none();
  std::shared_ptr<const UserState> state;
  {
    py::gil_scoped_release nogil;
    state = self.encode(arrays->data(), sizes, threads);
  }
  return py::cast(std::const_pointer_cast<UserState>(state));
}

py::object append(const SplitExecutors& self, const UserState& state, const py::tuple& events,
                  int threads) {
  const auto arrays = arrays_of(self.event_inputs(), events);
  SpecSizes sizes = unknown_sizes();
  if (!arrays || !self.event_inputs().admits(arrays->data(), sizes)) return py::none();
  std::shared_ptr<const UserState> next;
  {
    py::gil_scoped_release nogil;
    next = self.append(state, arrays->data(), threads);
  }
  return py::cast(std::const_pointer_cast<UserState>(next));
}

py::object score(const SplitExecutors& self, const UserState& state, const py::tuple& candidates,
                 int threads) {
  const auto arrays = arrays_of(self.candidate_inputs(), candidates);
  SpecSizes sizes = state.sizes;
  if (!arrays || !self.candidate_inputs().admits(arrays->data(), sizes)) return py::none();
  py::array_t<float> scores(self.output_sizes(sizes));
  float* const to = scores.mutable_data();
  py::gil_scoped_release nogil;
  self.score(state, arrays->data(), sizes, to, threads);
  return scores;
}

py::dict sizes_of(const SplitExecutors& parts, const UserState& state) {
  py::dict sizes;
  const InputSpec& spec = parts.history_inputs();
  for (size_t s = 0; s < spec.symbols.size(); ++s)
    if (state.sizes[s] >= 0) sizes[py::str(spec.symbols[s])] = state.sizes[s];
  return sizes;
}

py::list described_kinds() {
  constexpr const char* kUsers[] = {"mixed", "apart", "apart_of_two"};
  py::list all;
  for (const Kind& kind : kinds()) {
    py::list operands, fields;
    for (const OperandRule& rule : kind.operands) {
      py::dict row;
      row["name"] = rule.name;
      row["optional"] = rule.optional;
      row["output"] = rule.output;
      row["strided"] = rule.strided;
      row["many"] = rule.many;
      operands.append(row);
    }
    for (const FieldRule& rule : kind.fields) {
      py::dict row;
      row["name"] = rule.name;
      row["type"] = rule.type;
      row["choices"] = rule.choices;
      fields.append(row);
    }
    py::dict row;
    row["name"] = kind.name;
    row["op"] = kind.traits.op;
    row["shown"] = kind.traits.shown;
    row["users"] = kUsers[static_cast<int>(kind.traits.users)];
    row["operands"] = operands;
    row["fields"] = fields;
    all.append(row);
  }
  return all;
}

// fastrec.errors of what the engine throws.
void translate(std::exception_ptr thrown) {
  const auto raise = [](const char* type, auto&&... arguments) {
    const py::object kind = py::module_::import("fastrec.errors").attr(type);
    PyErr_SetObject(kind.ptr(), kind(arguments...).ptr());
  };
  try {
    std::rethrow_exception(thrown);
  } catch (const Refused& e) {
    switch (e.kind) {
      case Refused::Kind::argument:
        return raise("ArgumentError", e.name, e.expected, e.came);
      case Refused::Kind::shape:
        return raise("ShapeError", e.name, e.expected, e.came);
      case Refused::Kind::id_range:
        return raise("IdRangeError", e.name, e.expected, e.came);
      case Refused::Kind::unsupported:
        return raise("BackendError", e.what());
    }
  } catch (const CannotSplit& e) {
    raise("BackendError", e.what());
  } catch (const FileError& e) {
    raise("ArtifactError", e.what());
  } catch (const InvalidProgram& e) {
    raise("BackendError", e.what());
  } catch (const json::Error& e) {
    raise("BackendError", e.what());
  }
}

}  // namespace

void bind(py::module_& parent) {
  py::module_ m = parent.def_submodule("engine");
  py::register_local_exception_translator(translate);
  m.attr("MAX_SYMBOLS") = kMaxSymbols;
  m.attr("MAX_DIMS") = kMaxDims;
  m.attr("MAX_OPERANDS") = kMaxOperands;
  m.attr("MAX_REGISTERS") = kMaxRegisters;
  m.attr("MAP_OPS") = std::vector<std::string>(kMapOpNames, kMapOpNames + kMapOps);
  m.attr("EVERYTHING") = kEverything;
  m.attr("FILE_VERSION") = kFileVersion;
  m.attr("KINDS") = described_kinds();
  py::class_<BoundEngine>(m, "Engine")
      .def_static("build", build, py::arg("header"), py::arg("constants"),
                  "From a file's header (its sections may be missing) and copies of the constants.")
      .def_static("open", open, py::arg("path"), py::arg("copy"))
      .def_readonly("header", &BoundEngine::header)
      .def_property_readonly("constants", constants_of,
                             "Read-only bytes, as the engine holds them.")
      .def("__call__", call, py::arg("inputs"), py::arg("threads"),
           "The output, or a tuple of several; None where the inputs are not numpy arrays as the "
           "specification says.")
      .def(
          "plan", [](const BoundEngine& self) { return json::write(self.engine->plan()); },
          "JSON: see Engine::plan in engine.h.")
      .def("profile", profiled, py::arg("inputs"), py::arg("calls"), py::arg("threads"))
      .def(
          "split",
          [](BoundEngine& self, const std::vector<int>& candidates, bool appendable) {
            return self.engine->split(candidates, appendable);
          },
          py::keep_alive<0, 1>(), py::arg("candidates"), py::arg("appendable"));
  py::class_<SplitExecutors, std::shared_ptr<SplitExecutors>>(m, "SplitExecutors")
      .def_property_readonly("history", &SplitExecutors::history)
      .def_property_readonly("candidates", &SplitExecutors::candidates)
      .def_property_readonly("events",
                             [](const SplitExecutors& self) {
                               return self.appends() ? self.events() : std::vector<int>{};
                             })
      .def_property_readonly("programs", &SplitExecutors::programs)
      .def_property_readonly("scores", &SplitExecutors::scores)
      .def_property_readonly("appends", &SplitExecutors::appends)
      .def("encode", encode, py::arg("history"), py::arg("threads"))
      .def("append", append, py::arg("state"), py::arg("events"), py::arg("threads"))
      .def("score", score, py::arg("state"), py::arg("candidates"), py::arg("threads"))
      .def("sizes", sizes_of, py::arg("state"), "Symbol -> size of the state's histories.");
  py::class_<UserState, std::shared_ptr<UserState>>(m, "UserState")
      .def_property_readonly("values",
                             [](const UserState& self) {
                               py::list arrays;
                               for (const SharedValues& v : self.values)
                                 arrays.append(values_of(v));
                               return arrays;
                             })
      .def_readonly("lengths", &UserState::lengths)
      .def_property_readonly("nbytes", &UserState::bytes);
}

}  // namespace fastrec::engine
