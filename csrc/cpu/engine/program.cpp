#include "engine/program.h"

#include <algorithm>
#include <map>
#include <stdexcept>

namespace fastrec::engine {
namespace {

using json::Value;

// Beyond any model, and small enough for passes that compare steps in pairs.
constexpr size_t kMaxSteps = 8192;
constexpr int64_t kMaxExponent = 8;

template <size_t N>
int index_of(const char* const (&names)[N], const std::string& name, const char* what) {
  for (size_t i = 0; i < N; ++i)
    if (name == names[i]) return static_cast<int>(i);
  throw InvalidProgram("an unknown " + std::string(what) + ": " + name);
}

class Reader {
 public:
  Reader(const Value& value, std::vector<Constant> constants) : value_(value) {
    program_.constants = std::move(constants);
  }

  Program read() {
    for (const Value& symbol : value_.at("symbols").list()) {
      if (program_.symbols.size() == kMaxSymbols)
        throw InvalidProgram("more than " + std::to_string(kMaxSymbols) + " symbols");
      program_.symbols.push_back(symbol.text());
    }
    for (const Value& row : value_.at("buffers").list()) program_.buffers.push_back(buffer(row));
    for (const Value& index : value_.at("inputs").list())
      program_.inputs.push_back(buffer_index(index));
    const json::List& steps = value_.at("steps").list();
    if (steps.size() > kMaxSteps) throw InvalidProgram("too many steps");
    for (const Value& row : steps) program_.steps.push_back(step(row));
    for (const Value& row : value_.at("outputs").list()) program_.outputs.push_back(view(row));
    return std::move(program_);
  }

 private:
  int buffer_index(const Value& value) const {
    const int64_t index = value.integer();
    if (index < 0 || index >= static_cast<int64_t>(program_.buffers.size()))
      throw InvalidProgram("a buffer that does not exist");
    return static_cast<int>(index);
  }

  Extent extent(const Value& value) const {
    const json::List& items = value.list();
    Extent e(value[0].integer());
    for (size_t i = 1; i < items.size(); ++i) {
      const auto& symbols = program_.symbols;
      const auto found = std::find(symbols.begin(), symbols.end(), items[i].text());
      if (found == symbols.end()) throw InvalidProgram("sizes of known symbols");
      uint8_t& exponent = e.exponent[found - symbols.begin()];
      if (++exponent > kMaxExponent) throw InvalidProgram("sizes of few symbols");
    }
    return e;
  }

  Shape shape(const Value& value) const {
    const json::List& items = value.list();
    if (items.size() > kMaxDims)
      throw InvalidProgram("at most " + std::to_string(kMaxDims) + " dimensions");
    Shape sizes;
    for (const Value& item : items) sizes.push_back(extent(item));
    return sizes;
  }

  Buffer buffer(const Value& row) const {
    Buffer b;
    b.space = static_cast<Space>(index_of(kSpaceNames, row.at("space").text(), "space"));
    b.dtype = static_cast<Dtype>(index_of(kDtypeNames, row.at("dtype").text(), "dtype"));
    b.shape = shape(row.at("shape"));
    const int64_t index = row.at("index").integer();
    const size_t count = b.space == Space::constant ? program_.constants.size()
                         : b.space == Space::input  ? value_.at("inputs").list().size()
                                                    : 1;
    if (index < 0 || index >= static_cast<int64_t>(count))
      throw InvalidProgram("a buffer of a constant or input that does not exist");
    b.index = static_cast<int>(index);
    return b;
  }

  View view(const Value& row) const {
    View v;
    v.buffer = buffer_index(row[0]);
    v.offset = row[1].integer();
    v.sizes = shape(row[2]);
    v.strides = shape(row[3]);
    if (v.sizes.size() != v.strides.size()) throw InvalidProgram("a stride for each size");
    return v;
  }

  ProgramStep step(const Value& row) const {
    ProgramStep s;
    const std::string& name = row.at("kind").text();
    s.kind = find_kind(name);
    if (!s.kind) throw InvalidProgram("a step kind that this version does not know: " + name);
    s.module = row.at("module").text();
    const Value& operands = row.at("operands");
    size_t known = 0;
    for (const OperandRule& rule : s.kind->operands) {
      const Value* given = operands.find(rule.name);
      known += given != nullptr;
      if (rule.many) {
        if (given)
          for (const Value& one : given->list()) s.operands.push_back(view(one));
      } else if (given) {
        s.operands.push_back(view(*given));
      } else if (rule.optional) {
        s.operands.emplace_back();
      } else {
        throw InvalidProgram(name + " without its operand " + rule.name);
      }
      if (s.operands.size() > kMaxOperands)
        throw InvalidProgram("at most " + std::to_string(kMaxOperands) + " operands");
    }
    if (known != operands.object().size())
      throw InvalidProgram(name + " with an operand that it does not have");
    s.fields = s.kind->read(row.at("fields"));
    return s;
  }

  const Value& value_;
  Program program_;
};

Value written(const Program& program, const Extent& extent) {
  json::List list{extent.coefficient};
  for (size_t s = 0; s < program.symbols.size(); ++s)
    for (int e = 0; e < extent.exponent[s]; ++e) list.emplace_back(program.symbols[s]);
  return list;
}

Value written(const Program& program, const Shape& shape) {
  json::List list;
  for (const Extent& size : shape) list.push_back(written(program, size));
  return list;
}

Value written(const Program& program, const View& view) {
  return json::List{static_cast<int64_t>(view.buffer), view.offset, written(program, view.sizes),
                    written(program, view.strides)};
}

Value written(const Program& program, const ProgramStep& step) {
  json::Object operands;
  size_t at = 0;
  const size_t others = step.kind->operands.size() - 1;
  for (const OperandRule& rule : step.kind->operands) {
    if (rule.many) {
      json::List list;
      for (const size_t end = step.operands.size() - others; at < end; ++at)
        list.push_back(written(program, step.operands[at]));
      operands.emplace_back(rule.name, std::move(list));
      continue;
    }
    const View& view = step.operands[at++];
    if (!view.absent()) operands.emplace_back(rule.name, written(program, view));
  }
  return json::Object{{"kind", step.kind->name},
                      {"module", step.module},
                      {"operands", std::move(operands)},
                      {"fields", step.kind->write(step.fields.get())}};
}

}  // namespace

const OperandRule& ProgramStep::rule(size_t position) const {
  const auto& rules = kind->operands;
  if (!rules[0].many) return rules[position];
  const size_t many = operands.size() - (rules.size() - 1);
  return rules[position < many ? 0 : position - many + 1];
}

bool Program::is_whole(const View& view) const {
  return view.offset == 0 && view.sizes == buffers[view.buffer].shape && view.is_contiguous();
}

bool View::is_contiguous() const {
  const Shape expected = contiguous_strides(sizes);
  for (size_t d = 0; d < sizes.size(); ++d)
    if (sizes[d] != Extent(1) && strides[d] != expected[d]) return false;
  return true;
}

View Program::whole(int buffer) const {
  return {buffer, 0, buffers[buffer].shape, contiguous_strides(buffers[buffer].shape)};
}

Program read_program(const json::Value& value, std::vector<Constant> constants) {
  return Reader(value, std::move(constants)).read();
}

json::Value write_program(const Program& program) {
  json::List symbols, buffers, inputs, steps, outputs;
  for (const std::string& symbol : program.symbols) symbols.emplace_back(symbol);
  for (const Buffer& b : program.buffers)
    buffers.push_back(json::Object{{"space", kSpaceNames[static_cast<int>(b.space)]},
                                   {"dtype", kDtypeNames[static_cast<int>(b.dtype)]},
                                   {"shape", written(program, b.shape)},
                                   {"index", b.index}});
  for (const int input : program.inputs) inputs.emplace_back(input);
  for (const ProgramStep& step : program.steps) steps.push_back(written(program, step));
  for (const View& view : program.outputs) outputs.push_back(written(program, view));
  return json::Object{{"symbols", std::move(symbols)},
                      {"buffers", std::move(buffers)},
                      {"inputs", std::move(inputs)},
                      {"steps", std::move(steps)},
                      {"outputs", std::move(outputs)}};
}

}  // namespace fastrec::engine
