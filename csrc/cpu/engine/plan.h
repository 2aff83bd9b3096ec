// A plan: the steps of a model in order, on tensors whose sizes may depend on a few symbols (the
// batch, the history length, the candidates). Built once by the Python front end, which has checked
// every shape and dtype; immutable, so that any number of callers may run it.
//
// A size or stride is a product: coefficient * symbol_0^e0 * symbol_1^e1 ... That is all that
// reshapes of contiguous tensors ever need, and it is resolved for a call in a few nanoseconds.
#pragma once

#include <array>
#include <cstddef>
#include <cstdint>
#include <memory>
#include <string>
#include <vector>

namespace fastrec::engine {

inline constexpr int kMaxSymbols = 4;
inline constexpr int kMaxDims = 6;
inline constexpr int kMaxOperands = 32;

enum class Dtype : int { f32, i64, u8, s8, b8, i32 };
int64_t bytes_of(Dtype dtype);

using Symbols = std::array<int64_t, kMaxSymbols>;

struct Extent {
  int64_t coefficient = 0;
  std::array<uint8_t, kMaxSymbols> exponent{};

  int64_t at(const Symbols& symbols) const {
    int64_t value = coefficient;
    for (int s = 0; s < kMaxSymbols; ++s)
      for (int e = 0; e < exponent[s]; ++e) value *= symbols[s];
    return value;
  }

  // The same where 64 bits may not hold it.
  double roughly(const Symbols& symbols) const {
    double value = static_cast<double>(coefficient);
    for (int s = 0; s < kMaxSymbols; ++s)
      for (int e = 0; e < exponent[s]; ++e) value *= static_cast<double>(symbols[s]);
    return value;
  }
};

// Where an operand's memory comes from.
enum class Space : int { input, constant, arena, output };

struct Operand {
  Space space;
  int index;  // of the input, constant, arena slot or output
  Dtype dtype;
  int64_t offset;  // elements
  std::vector<Extent> sizes, strides;
  int64_t tile_row = 0;  // bytes of a row's place where the rows lie in tiles, else 0
};

// An operand of one call: address, sizes and strides in elements.
struct Tensor {
  std::byte* data;
  Dtype dtype;
  int dims;
  int64_t sizes[kMaxDims], strides[kMaxDims];

  template <class T>
  T* as() const {
    return reinterpret_cast<T*>(data);
  }
  int64_t count() const {
    int64_t n = 1;
    for (int d = 0; d < dims; ++d) n *= sizes[d];
    return n;
  }
};

struct Step;

// What went wrong in a step: nothing, or the position of an id outside a table, or a NaN.
enum class Fault : int { none, id_out_of_range, not_a_number };
struct Status {
  Fault fault = Fault::none;
  int step = -1;
  int64_t value = 0;
};

using Run = Status (*)(const Step& step, const Tensor* operands);
// Checks, and work that depends on constants alone, done once; operands that are not constant have
// no address.
using Prepare = std::shared_ptr<void> (*)(const Step& step, const Tensor* operands);

struct Step {
  std::string kind;
  Run run;
  std::vector<Operand> operands;  // the result last
  std::vector<int64_t> integers;  // parameters, in the order each kind documents
  std::vector<double> numbers;
  std::shared_ptr<void> prepared;  // may be another plan's, for a step on the same constants
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
  std::vector<const std::byte*> constants;  // borrowed from the artifact, which outlives the plan
  std::vector<Slot> slots;
  std::vector<Step> steps;
};

struct Kind {
  const char* name;
  Run run;
  Prepare prepare;  // or null
};
// A step kind by its name, or null.
const Kind* find_kind(const std::string& name);

}  // namespace fastrec::engine
