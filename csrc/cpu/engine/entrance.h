// What the inputs of a call must be. A request in order passes here from Python to the executor in
// a microsecond; one that is not goes to Python's InputSpec, which says what is wrong with it.
#pragma once

#include <cstdint>
#include <vector>

#include "engine/plan.h"

namespace fastrec::engine {

struct Range {
  int64_t low, high;
};

// A size, or (symbol >= 0) that symbol's.
struct Size {
  int64_t size;
  int symbol = -1;
};

struct Input {
  Dtype dtype;
  std::vector<Size> dims;
  // Values lie in 0..top - 1, or in 0..size of a symbol; unchecked where there is neither. A float
  // is no NaN.
  bool checked;
  Size top;
};

// A contiguous array of a request.
struct Array {
  const std::byte* data;
  Dtype dtype;
  int dims;
  const int64_t* sizes;
};

class Entrance {
 public:
  // `limits`: of each symbol's size. Ids are i64 or i32.
  Entrance(std::vector<Input> inputs, std::vector<Range> limits)
      : inputs_(std::move(inputs)), limits_(std::move(limits)) {}

  size_t inputs() const { return inputs_.size(); }
  // Whether the arrays, as many as there are inputs, are what the plan takes; if so the symbols'
  // sizes are set.
  bool admits(const Array* arrays, Symbols& symbols) const;

 private:
  bool fits(const Input& input, const Array& array, Symbols& symbols) const;

  std::vector<Input> inputs_;
  std::vector<Range> limits_;
};

}  // namespace fastrec::engine
