#include "engine/engine.h"

#include <algorithm>
#include <cmath>
#include <set>

#include "engine/check.h"
#include "engine/planner.h"
#include "engine/split.h"
#include "engine/user_state.h"
#include "parallel.h"

namespace fastrec::engine {
namespace {

constexpr int64_t kMaxThreads = 1024;

// The inputs are as the specification says.
void check_inputs(const Program& program, const InputSpec& spec) {
  const auto require = [](bool true_, const char* what) {
    if (!true_) throw InvalidProgram(std::string("an invalid plan: ") + what);
  };
  require(program.inputs.size() == spec.fields.size(), "an input buffer for each input");
  for (size_t i = 0; i < spec.fields.size(); ++i) {
    const InputField& field = spec.fields[i];
    const Buffer& buffer = program.buffers[program.inputs[i]];
    Shape shape;
    for (const SpecSize& dim : field.dims) {
      require(dim.symbol < static_cast<int>(program.symbols.size()), "inputs of known symbols");
      shape.push_back(dim.symbol < 0 ? Extent(dim.number) : Extent::of_symbol(dim.symbol));
    }
    const bool fits = buffer.shape == shape && buffer.dtype == field.dtype &&
                      buffer.space == Space::input && buffer.index == static_cast<int>(i);
    if (!fits) throw InvalidProgram("an invalid plan: input " + field.name + " as specified");
  }
}

// Positions of the inputs that a view's values come from, as steps before `end` made them.
std::set<int> sources(const Program& program, int end, int buffer) {
  std::vector<int> open{buffer};
  std::set<int> seen, found;
  while (!open.empty()) {
    const int b = open.back();
    open.pop_back();
    if (!seen.insert(b).second) continue;
    for (int p = 0; p < end; ++p) {
      const ProgramStep& step = program.steps[p];
      const auto writes = [&](size_t o) {
        return step.writes(o) && !step.operands[o].absent() && step.operands[o].buffer == b;
      };
      bool made = false;
      for (size_t o = 0; o < step.operands.size(); ++o) made = made || writes(o);
      for (size_t o = 0; made && o < step.operands.size(); ++o)
        if (!step.operands[o].absent() && !step.writes(o)) open.push_back(step.operands[o].buffer);
    }
  }
  for (size_t i = 0; i < program.inputs.size(); ++i)
    if (seen.count(program.inputs[i])) found.insert(static_cast<int>(i));
  return found;
}

// Whether a buffer holds an input's own values, perhaps copied.
bool is_input(const Program& program, int end, int buffer) {
  while (program.buffers[buffer].space != Space::input) {
    const ProgramStep* made = nullptr;
    for (int p = 0; p < end; ++p)
      for (size_t o = 0; o < program.steps[p].operands.size(); ++o)
        if (program.steps[p].writes(o) && program.steps[p].operands[o].buffer == buffer) {
          if (made) return false;
          made = &program.steps[p];
          end = p;
        }
    if (!made || !made->kind->operands[0].many || made->operands.size() != 2) return false;
    if (made->kind->write(made->fields.get()).at("program").list().size()) return false;
    buffer = made->operands[0].buffer;
  }
  return true;
}

bool holds(const Array& array, int64_t value) {
  const int64_t count = array.count();
  const auto in = [&](const auto* ids) {
    return std::find(ids, ids + count, value) != ids + count;
  };
  if (array.dtype == Dtype::i64) return in(reinterpret_cast<const int64_t*>(array.data));
  if (array.dtype == Dtype::i32) return in(reinterpret_cast<const int32_t*>(array.data));
  return false;
}

bool holds_nan(const Array& array) {
  if (array.dtype != Dtype::f32) return false;
  const float* const values = reinterpret_cast<const float*>(array.data);
  return std::any_of(values, values + array.count(), [](float v) { return std::isnan(v); });
}

}  // namespace

CallThreads::CallThreads(int threads) : before(exchange_call_threads(threads)) {}
CallThreads::~CallThreads() { exchange_call_threads(before); }

Symbols symbols_of(const SpecSizes& sizes) {
  Symbols symbols;
  for (int s = 0; s < kMaxSymbols; ++s) symbols[s] = std::max<int64_t>(sizes[s], 0);
  return symbols;
}

Refused refusal_of(const Program& program, const std::vector<std::string>& names,
                   const Array* inputs, const Symbols& symbols, const Status& status) {
  const ProgramStep& step = program.steps[status.step];
  const std::string where = step.module.empty() ? step.kind->name : step.module;
  if (status.fault == Fault::not_a_number) {
    std::string name = where;
    for (size_t i = names.size(); i-- > 0;)
      if (holds_nan(inputs[i])) name = names[i];
    return {Refused::Kind::argument, name, "an input of numbers", "a NaN"};
  }
  if (status.fault == Fault::division_by_zero)
    return {Refused::Kind::argument, where, "integers divided by others than 0", "0"};
  const Checked& checked = step.kind->traits.checked;
  const View& limit = step.operands[checked.limit_operand];
  const std::string what = checked.what;
  const int dim = checked.limit_dim;
  const int64_t last =
      limit.sizes[dim < 0 ? limit.sizes.size() + dim : dim].at(symbols) - (what == "ids" ? 1 : 0);
  const std::string expected = what + " in 0.." + std::to_string(last);
  const std::string came = std::to_string(status.value);
  const int operand = status.operand < 0 ? checked.operand : status.operand;
  const int buffer = step.operands[operand].buffer;
  const std::set<int> found = sources(program, status.step, buffer);
  if (found.empty()) return {Refused::Kind::id_range, where, expected, came};
  std::string any;
  for (const int i : found) {
    if (holds(inputs[i], status.value)) return {Refused::Kind::id_range, names[i], expected, came};
    any += (any.empty() ? "" : " or ") + names[i];
  }
  if (is_input(program, status.step, buffer)) return {Refused::Kind::id_range, any, expected, came};
  return {Refused::Kind::id_range, any, "values of which " + where + " gets " + expected, came};
}

Engine::Engine(const json::Value& header, std::vector<Constant> constants,
               std::shared_ptr<void> memory)
    : memory_(std::move(memory)),
      program_(read_program(header.at("program"), std::move(constants))),
      inputs_(InputSpec::read(header.at("spec"), program_.symbols)) {
  const int64_t threads = header.at("threads").integer();
  if (threads < 1 || threads > kMaxThreads) throw InvalidProgram("a sound number of threads");
  threads_ = static_cast<int>(threads);
  check_inputs(program_, inputs_);
  check(program_, {inputs_.limits.begin(), inputs_.limits.begin() + program_.symbols.size()});
  for (size_t i = 0; i < program_.outputs.size(); ++i) {
    Buffer& output = program_.buffers[program_.outputs[i].buffer];
    output.space = Space::output;
    output.index = static_cast<int>(i);
  }
  order_by_rows(program_);
  executor_ = std::make_unique<Executor>(make_plan(program_));
}

Engine::~Engine() = default;

json::Value Engine::plan() const {
  const Plan& plan = executor_->plan();
  const auto symbol = [&](int s) -> json::Value {
    if (s < 0) return nullptr;
    return program_.symbols[s];
  };
  json::List groups, slots(plan.slots.size(), json::List());
  for (const RowGroup& group : plan.groups)
    groups.push_back(json::List{group.begin, group.end, symbol(group.symbol)});
  // Steps' operands tell which slot a buffer has.
  std::vector<std::vector<int>> buffers(plan.slots.size());
  for (size_t p = 0; p < plan.steps.size(); ++p)
    for (size_t o = 0; o < plan.steps[p].operands.size(); ++o) {
      const Operand& operand = plan.steps[p].operands[o];
      if (operand.space != Space::arena || operand.index < 0) continue;
      std::vector<int>& of = buffers[operand.index];
      const int buffer = program_.steps[p].operands[o].buffer;
      if (std::find(of.begin(), of.end(), buffer) == of.end()) of.push_back(buffer);
    }
  for (size_t s = 0; s < buffers.size(); ++s)
    slots[s] = json::List(buffers[s].begin(), buffers[s].end());
  json::List rows;
  for (const Extent& count : plan.rows) {
    json::List row{count.coefficient};
    for (int s = 0; s < kMaxSymbols; ++s)
      for (int e = 0; e < count.exponent[s]; ++e) row.push_back(symbol(s));
    rows.emplace_back(std::move(row));
  }
  json::Object described = write_program(program_).object();
  described.emplace_back("rows_of_layers", std::move(rows));
  described.emplace_back("users", symbol(plan.users));
  described.emplace_back("groups", std::move(groups));
  described.emplace_back("slots", std::move(slots));
  return described;
}

bool Engine::gives_scores() const {
  return program_.outputs.size() == 1 &&
         program_.buffers[program_.outputs[0].buffer].dtype == Dtype::f32;
}

std::vector<int64_t> Engine::output_sizes(const SpecSizes& sizes, size_t output) const {
  return sizes_at(program_.outputs[output].sizes, symbols_of(sizes));
}

void Engine::run(const Array* inputs, const SpecSizes& sizes, float* scores, int threads) {
  if (!gives_scores()) throw Refused("this plan gives other results than scores");
  std::byte* const outputs[] = {reinterpret_cast<std::byte*>(scores)};
  run(inputs, sizes, outputs, threads);
}

void Engine::run(const Array* inputs, const SpecSizes& sizes, std::byte* const* outputs,
                 int threads, int64_t* step_ns) {
  const std::byte* addresses[kMaxOperands];
  for (size_t i = 0; i < inputs_.fields.size(); ++i) addresses[i] = inputs[i].data;
  const Symbols symbols = symbols_of(sizes);
  Status status;
  {
    const CallThreads limit(threads);
    status = executor_->run(symbols, addresses, outputs, step_ns);
  }
  if (status.fault == Fault::none) return;
  std::vector<std::string> names;
  for (const InputField& field : inputs_.fields) names.push_back(field.name);
  throw refusal_of(program_, names, inputs, symbols, status);
}

std::shared_ptr<SplitExecutors> Engine::split(const std::vector<int>& candidates, bool appendable) {
  if (!gives_scores()) throw CannotSplit("this plan's results are no scores: it runs as a whole");
  const std::lock_guard lock(mutex_);
  std::shared_ptr<SplitExecutors>& made = splits_[{candidates, appendable}];
  if (!made) made = std::make_shared<SplitExecutors>(*this, candidates, appendable);
  return made;
}

}  // namespace fastrec::engine
