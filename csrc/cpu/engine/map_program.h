// The program of a map step: instructions on registers.
#pragma once

#include <vector>

#include "engine/json.h"
#include "engine/map_ops.h"
#include "engine/step_kind.h"

namespace fastrec::engine {

struct MapInstruction {
  MapOp op;
  int a = 0, b = 0, c = 0;  // registers; of `index`, a is the dimension
  float number = 0;         // of `number`
  int64_t integer = 0;      // of `integer`
};

// Registers 0 .. inputs - 1 are the operands, each instruction appends one; the last one is the
// result (without instructions: a copy).
//
// In JSON [name, register, ...], ["number", value], ["integer", value], ["index", dimension]; a
// number that is not finite is "inf", "-inf" or "nan".
struct MapProgram {
  static constexpr const char* kType = "program";

  std::vector<MapInstruction> instructions;

  static MapProgram read(const json::Value& value);
  json::Value write() const;

  int size() const { return static_cast<int>(instructions.size()); }
  bool reads_index(int dim) const;
  // Throws InvalidProgram where it reads what is not there.
  void check(int inputs, int result_dims) const;
  // The same with one more input, the last, added to the positions along `dim`.
  MapProgram moved_on(int inputs, int dim) const;
};

// The fields of a map step; `map_fields` makes them by hand.
std::shared_ptr<const void> map_fields(MapProgram program);

}  // namespace fastrec::engine
