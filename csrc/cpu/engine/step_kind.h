// A kind of step, told once in steps/<kind>.cpp: its operands, fields, check, kernel and traits.
//
// The check, the executor, the planner and the Python front end ask the Kind; no list of kinds
// stands anywhere but in steps/kinds.h. A kind is a struct that make_kind (make_kind.h) reads:
//
//   struct Gather {
//     static constexpr const char* name = "gather";
//     enum { ids, table, scale, y };  // positions of the operands
//     static constexpr OperandRule operands[] = {
//         {.name = "ids"}, {.name = "table"}, {.name = "scale", .optional = true},
//         {.name = "y", .output = true}};
//     struct Fields {
//       template <class V> void each(V& visit) { visit("activation", activation, kNames); ... }
//     };
//     static constexpr Traits traits = {...};
//     static Rows rows(const Fields&);                         // which rows it keeps apart
//     static void check(const StepCheck&, const Fields&);      // throws InvalidProgram
//     static Status run(const Fields&, Tensors, const void* prepared);
//     static void cost(const Fields&, Tensors, Cost&);
//     // where an op's kernel runs it: the instruction set of the kernel that runs it now
//     static std::optional<Isa> isa(const Fields&, Tensors);
//     // where describe() calls it otherwise for some operands
//     static const char* shown(const Fields&, Tensors);
//     // where there is work that depends on constants alone, done once
//     static std::shared_ptr<void> prepare(const Fields&, Tensors);
//     // where operands may lie in the tiles of linear_int8: a bit for each such operand
//     static uint32_t tiled(const Fields&);
//     // where it may be causal attention: the fields of resumed_attention, or null
//     static std::shared_ptr<const void> resumed(const Fields&);
//     // where it may read positions: whether it reads those along dimension `dim`; and the fields
//     // with them counted on by one more input, the last (null where it does not read them)
//     static bool reads_index(const Fields&, int dim);
//     static std::shared_ptr<const void> moved_on(const Fields&, int inputs, int dim);
//   };
//
// A kind that has not told a trait that has no default does not compile.
#pragma once

#include <cstdint>
#include <memory>
#include <optional>
#include <span>
#include <stdexcept>
#include <string>
#include <string_view>
#include <vector>

#include "engine/extent.h"
#include "engine/json.h"
#include "engine/tensor.h"

namespace fastrec::engine {

// A program that no kernel may see, and what a sound one has.
class InvalidProgram : public std::runtime_error {
  using std::runtime_error::runtime_error;
};

struct OperandRule {
  const char* name;
  bool optional = false;
  bool output = false;
  // The kernel reads any strides but the last dimension's, which is contiguous; others read
  // contiguous operands alone.
  bool strided = false;
  bool many = false;  // any number of operands under this name (map's inputs); any strides
};

// A step's fault: nothing, or an id outside its range, or a NaN, or an integer divided by 0.
enum class Fault : int { none, id_out_of_range, not_a_number, division_by_zero };
struct Status {
  Fault fault = Fault::none;
  int step = -1;
  int64_t value = 0;
  int operand = -1;  // with the value, where it is not the one that the kind's traits name
};

// Which rows of one user a step keeps apart, so that threads may share them out.
enum class Rows {
  mixed,     // none
  elements,  // an element of the result follows from the operands' at its position (map)
  lookup,    // a row of the result from the first operand's element at its position (gather)
  last,      // a row along the last dimension from the operands' row (linear layers, norms)
  queries,   // a query's row from that query and from all keys
};

// Whether the users of a batch, its first dimension, are kept apart.
enum class Users {
  mixed,
  apart,         // always
  apart_of_two,  // where the first operand has another dimension, which the step reduces
};

// A fault in the caller's terms: the operand with the value, and what its values must be.
struct Checked {
  int operand = -1;                       // -1: the kind reads no ids and no lengths
  const char* what = "";                  // "ids" or "lengths"
  int limit_operand = -1, limit_dim = 0;  // ids lie below that size; lengths may equal it
};

struct Traits {
  const char* op;     // the op whose kernel runs it; "": the engine's own loops
  const char* shown;  // the name in describe()
  Users users;
  Checked checked = {};
  // Its weights meet one row of a user at a time (recurrent layers): users are better run together.
  bool one_row = false;
};

// Memory traffic and arithmetic of one call of a step. Each byte counts once, however often a
// kernel comes back to it.
struct Cost {
  int64_t constant_bytes = 0, activation_bytes = 0, written_bytes = 0;
  std::optional<int64_t> macs;  // multiply-adds
  // "fp32", "bf16", "int8"; "": it only moves bytes; none: unknown
  std::optional<std::string> peak;
  std::optional<double> density;  // share of its weights' groups that are kept
};

struct FieldRule {
  std::string name;
  std::string type;  // "flag", "integer", "number", "choice", "lists", "program"
  std::vector<std::string> choices;
};

class StepCheck;  // engine/check.h

// A step's operands in the kind's order; an optional one that is absent has no address.
using Tensors = std::span<const Tensor>;

struct Kind {
  const char* name;
  std::span<const OperandRule> operands;
  std::vector<FieldRule> fields;
  Traits traits;
  // Throws json::Error: a field is missing, unknown or of another type.
  std::shared_ptr<const void> (*read)(const json::Value& fields);
  json::Value (*write)(const void* fields);
  Rows (*rows)(const void* fields);
  void (*check)(const StepCheck& check, const void* fields);
  Status (*run)(const void* fields, Tensors operands, const void* prepared);
  // The bytes are in `cost` already: each kind says what it knows better.
  void (*cost)(const void* fields, Tensors operands, Cost& cost);
  const char* (*shown)(const void* fields, Tensors operands);
  // Whether it reads positions along dimension `dim`.
  bool (*reads_index)(const void* fields, int dim);
  // Null where the kind has none.
  std::shared_ptr<void> (*prepare)(const void* fields, Tensors operands);
  uint32_t (*tiled)(const void* fields);
  std::shared_ptr<const void> (*resumed)(const void* fields);
  std::shared_ptr<const void> (*moved_on)(const void* fields, int inputs, int dim);
  // The name of the instruction set of the kernel that runs it now, or null.
  const char* (*isa)(const void* fields, Tensors operands);

  // The position of the operand of that name, or -1. (Of kinds without `many`.)
  int operand(std::string_view of) const;
};

// All kinds, in the order of steps/kinds.h; and one by its name, or null.
std::span<const Kind> kinds();
const Kind* find_kind(std::string_view name);

}  // namespace fastrec::engine
