// A plan: the steps of a program in order, on memory that is shared out for them. The planner
// makes it of a checked program; immutable, so that any number of callers may run it.
#pragma once

#include <memory>
#include <vector>

#include "engine/program.h"

namespace fastrec::engine {

struct Operand {
  Space space;
  int index;  // of the input, constant, arena slot or output; -1: absent
  Dtype dtype;
  int64_t offset;  // elements
  Shape sizes, strides;
  int64_t tile_row = 0;  // bytes of a row's place where the rows lie in tiles, else 0

  static Operand none() { return {Space::arena, -1, Dtype::f32, 0, {}, {}}; }
};

struct Step {
  const Kind* kind;
  std::shared_ptr<const void> fields;
  std::vector<Operand> operands;         // in the kind's order
  std::shared_ptr<const void> prepared;  // may be another plan's, for a step on the same constants
};

struct Slot {
  std::vector<Extent> bytes;  // the buffers that take turns in it: the largest counts
};

// Steps begin .. end - 1 keep the rows of one user apart, of which a symbol says how many.
struct RowGroup {
  int begin, end, symbol;
};

struct Plan {
  // The symbol that counts independent users, the first dimension of what depends on it; -1: none.
  int users = -1;
  std::vector<Extent> rows;                 // of one user, that linear layers see
  std::vector<RowGroup> groups;             // in order
  std::vector<const std::byte*> constants;  // borrowed: they outlive the plan
  std::vector<Slot> slots;
  std::vector<Step> steps;
};

}  // namespace fastrec::engine
