// A program: the steps of a model in order, on views of buffers, as an engine file describes it.
//
// It is in SSA form: each step writes a buffer (or a part of one) that no other step overwrites,
// and a view of a buffer costs nothing. The planner (planner.h) makes of a checked program the plan
// that the executor runs.
#pragma once

#include <memory>
#include <string>
#include <vector>

#include "engine/step_kind.h"

namespace fastrec::engine {

enum class Space : int { input, constant, arena, output };
inline constexpr const char* kSpaceNames[] = {"input", "constant", "arena", "output"};

// Contiguous memory.
struct Buffer {
  Space space = Space::arena;
  Dtype dtype = Dtype::f32;
  Shape shape;
  int index = 0;  // of the input or the constant
};

// A strided part of a buffer; strides and offset in elements.
struct View {
  int buffer = -1;  // -1: an optional operand that is absent
  int64_t offset = 0;
  Shape sizes, strides;

  bool absent() const { return buffer < 0; }
  // Elements follow each other in row-major order.
  bool is_contiguous() const;
  bool operator==(const View&) const = default;
};

struct ProgramStep {
  const Kind* kind = nullptr;
  std::string module;  // of the model, for people
  std::vector<View>
      operands;  // in the kind's order; those under a name of `many` beside each other
  std::shared_ptr<const void> fields;

  // How operand `position` is declared. (A name of `many` operands comes first.)
  const OperandRule& rule(size_t position) const;
  bool writes(size_t position) const { return rule(position).output; }
};

struct Constant {
  const std::byte* data = nullptr;
  int64_t bytes = 0;
};

struct Program {
  std::vector<std::string> symbols;
  std::vector<Buffer> buffers;
  std::vector<int> inputs;  // buffers
  std::vector<ProgramStep> steps;
  std::vector<View> outputs;  // whole buffers; of a model, one
  // Borrowed: the program's owner keeps them.
  std::vector<Constant> constants;

  bool is_whole(const View& view) const;
  // All of a buffer.
  View whole(int buffer) const;
};

// From JSON and back: {"symbols": [name], "buffers": [{"space", "dtype", "shape", "index"}],
// "inputs": [buffer], "steps": [{"kind", "module", "operands": {name: view or [view]}, "fields":
// {name: value}}], "outputs": [view]}; a view is [buffer, offset, sizes, strides], a size
// [coefficient, symbol, ...]. Throws json::Error or InvalidProgram; what it gives is well-formed
// but not yet checked.
Program read_program(const json::Value& value, std::vector<Constant> constants);
json::Value write_program(const Program& program);

}  // namespace fastrec::engine
