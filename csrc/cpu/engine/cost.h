// The bytes and operations of a step in one call, and the kernel that runs it.
#pragma once

#include "engine/program.h"

namespace fastrec::engine {

struct StepCost {
  Cost cost;
  int64_t bytes;      // of its constants, whole
  const char* shown;  // the name in describe()
  const char* isa;    // the instruction set of the kernel that runs it now; null: it has but one
};

// `inputs`: those of the call, or null where they are not at hand: lengths among them say what
// padding costs.
StepCost cost_of(const Program& program, const ProgramStep& step, const Symbols& symbols,
                 const std::byte* const* inputs = nullptr);

}  // namespace fastrec::engine
