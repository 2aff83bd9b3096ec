// From a checked program to the plan that the executor runs: which users and rows are independent,
// and which buffers share memory.
#pragma once

#include <vector>

#include "engine/plan.h"
#include "engine/program.h"

namespace fastrec::engine {

// The symbol that counts the independent users of a call: the first dimension of all that depends
// on it, whose rows no step mixes. -1: none.
int user_symbol(const Program& program);

// Brings steps on the same rows together, as far as what they read allows.
void order_by_rows(Program& program);

// The plan of a program. A part of a program shares what `whole`, the plan of all of it, has
// prepared: step i that of step origins[i], if not -1. Borrows the program's constants.
Plan make_plan(const Program& program, const Plan* whole = nullptr,
               const std::vector<int>& origins = {});

// The traits of a step that the planner goes by; also told of a step that is to be computed for new
// rows alone.
struct RowDimension {
  int dim = -1, symbol = -1;
  bool none() const { return dim < 0; }
  bool operator==(const RowDimension&) const = default;
};
// The only dimension that depends on more than the users, if it is the size of a symbol.
RowDimension row_dimension(const Shape& shape, int users);
// Whether a row reads its own values: those of one for all would be another thread's.
bool each_its_own(const Program& program, const View& view, int symbol);

}  // namespace fastrec::engine
