// The check of a program that came from a file: whatever it says, no kernel may touch memory
// outside the buffers, at any sizes.
//
// The whole of it is checked here (sizes, views, constants, order); what a kind needs of its
// operands and fields it checks itself, through a StepCheck.
#pragma once

#include <initializer_list>
#include <span>
#include <string>
#include <vector>

#include "engine/program.h"

namespace fastrec::engine {

// Of a symbol's size.
struct Limit {
  int64_t low = 1;
  int64_t high = -1;  // -1: none
};

// Throws InvalidProgram: what is wrong, and in which step. `limits`: of each symbol in order.
void check(const Program& program, const std::vector<Limit>& limits);

// Throws InvalidProgram unless `sound`; `what` is what a sound program has.
inline void require(bool sound, const char* what) {
  if (!sound) throw InvalidProgram(std::string("an invalid plan: ") + what);
}

// The product, which 64 bits hold with room to spare.
Extent times(const Extent& a, const Extent& b);

// The rows of a matrix and their fixed width.
struct Matrix {
  Extent rows;
  int64_t width;
};

using Dtypes = std::initializer_list<Dtype>;

// A step's operands for its kind's check: they are inside their buffers, and present unless they
// are optional. Each function that returns nothing throws InvalidProgram.
class StepCheck {
 public:
  StepCheck(const Program& program, const ProgramStep& step, const std::vector<Limit>& limits)
      : program_(program), step_(step), limits_(limits) {}

  int count() const { return static_cast<int>(step_.operands.size()); }
  bool has(int operand) const { return !step_.operands[operand].absent(); }
  const View& view(int operand) const { return step_.operands[operand]; }
  const Shape& sizes(int operand) const { return view(operand).sizes; }
  const Buffer& buffer(int operand) const { return program_.buffers[view(operand).buffer]; }
  Dtype dtype(int operand) const { return buffer(operand).dtype; }
  bool is_constant(int operand) const { return buffer(operand).space == Space::constant; }
  bool is(int operand, Dtypes dtypes) const;
  // The largest that a size may become; where a symbol has no limit, with `unlimited` for it.
  double most(const Extent& size, int64_t unlimited) const;

  // Of one of the dtypes, and contiguous.
  void dense(int operand, Dtypes dtypes) const;
  // Dimension `dim` is contiguous.
  void unit(int operand, size_t dim, const char* what) const;
  // A contiguous constant of these sizes.
  void table(int operand, Dtype dtype, std::initializer_list<int64_t> sizes) const;
  // The integers of an int32 table that was checked.
  std::span<const int32_t> integers(int operand) const;
  // Rows of a fixed width, along the last dimension.
  Matrix rows(int operand) const;
  // Results f32 or u8, a given number of rows; `tiled`: in the tiles of linear_int8.
  void result(int operand, const Matrix& matrix, bool tiled) const;
  // The tiles of linear_int8 with the widest elements, from a line's start on.
  void tiles(int operand, const Matrix& matrix) const;
  // An operand of as many elements as `size`.
  void elements(int operand, const Extent& size, const char* what) const;

 private:
  const Program& program_;
  const ProgramStep& step_;
  const std::vector<Limit>& limits_;
};

// Fields.
inline void require_byte(int64_t zero_point) {
  require(zero_point >= 0 && zero_point <= 255, "zero points in 0..255");
}
inline void require_scale(double scale) {
  require(static_cast<float>(scale) > 0, "scales above 0");
}

}  // namespace fastrec::engine
