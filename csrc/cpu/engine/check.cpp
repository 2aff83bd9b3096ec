#include "engine/check.h"

#include <algorithm>
#include <array>
#include <map>
#include <numeric>
#include <set>

#include "sparse_int8_linear/sparse_int8_linear.h"

namespace fastrec::engine {
namespace {

constexpr int64_t kMaxCoefficient = int64_t{1} << 40;
// Of the elements of a shape: beyond any memory, and far from what 64 bits hold.
constexpr int64_t kMaxElements = int64_t{1} << 50;
constexpr int kMaxDegree = 8;
constexpr size_t kMaxInputs = 32;
// Steps that write parts of one buffer, as a concatenation does.
constexpr int kMaxParts = 1024;
// Of an empty operand the other sizes are what loops may count.
constexpr int64_t kMaxEmptyRows = 1 << 20;

int degree(const Extent& extent) {
  return std::accumulate(extent.exponent.begin(), extent.exponent.end(), 0);
}

// Coefficients by the exponents of each symbol. 128 bits hold what the limits above allow: a size
// times a stride is below 2^80, a binomial of its exponents below 2^16, a buffer's elements below
// 2^50 with binomials below 2^48.
using Polynomial = std::map<std::array<uint8_t, kMaxSymbols>, __int128>;

// Adds `sign` * extent with each symbol s written as 1 + t.
void add_shifted(Polynomial& to, const Extent& a, const Extent& b, int sign) {
  Polynomial terms{{{}, sign * static_cast<__int128>(a.coefficient) * b.coefficient}};
  for (int s = 0; s < kMaxSymbols; ++s)
    for (int e = 0; e < a.exponent[s] + b.exponent[s]; ++e) {
      Polynomial next = terms;  // (1 + t) * terms
      for (const auto& [powers, coefficient] : terms) {
        auto raised = powers;
        ++raised[s];
        next[raised] += coefficient;
      }
      terms = std::move(next);
    }
  for (const auto& [powers, coefficient] : terms) to[powers] += coefficient;
}

// Elements of the buffer behind the view's last, with each symbol s written as 1 + t, t >= 0. Where
// no coefficient is negative, the view lies inside its buffer whatever the sizes.
Polynomial room_behind(const View& view, const Buffer& buffer) {
  Polynomial room;
  add_shifted(room, product(buffer.shape), 1, 1);
  room[{}] -= 1 + static_cast<__int128>(view.offset);
  for (size_t d = 0; d < view.sizes.size(); ++d) {
    add_shifted(room, view.sizes[d], view.strides[d], -1);
    add_shifted(room, 1, view.strides[d], 1);
  }
  return room;
}

class Checker {
 public:
  Checker(const Program& program, const std::vector<Limit>& limits)
      : program_(program), limits_(limits) {}

  void whole() {
    inputs();
    for (const Buffer& b : program_.buffers) buffer(b);
    require(!program_.outputs.empty() && program_.outputs.size() <= kMaxOperands,
            "an output, and at most 32");
    for (const View& output : program_.outputs) {
      inside(output);
      const Shape& made = program_.buffers[output.buffer].shape;
      const bool all =
          output.offset == 0 && output.is_contiguous() && product(output.sizes) == product(made);
      require(all && outputs_.insert(output.buffer).second, "outputs that are whole buffers");
    }
    written_.insert(program_.inputs.begin(), program_.inputs.end());
    for (size_t s = 0; s < program_.steps.size(); ++s) step(s);
    for (const int output : outputs_)
      require(written_.contains(output), "an output that is computed");
  }

 private:
  void inputs() const {
    const auto& symbols = program_.symbols;
    const std::set<std::string> names(symbols.begin(), symbols.end());
    require(symbols.size() <= kMaxSymbols && names.size() == symbols.size(), "at most 4 symbols");
    require(limits_.size() == symbols.size(), "limits for each symbol");
    for (const Limit& limit : limits_) {
      require(limit.low >= 1, "sizes of at least 1");
      require(limit.high == -1 || limit.high >= limit.low, "limits in order");
    }
    const auto& inputs = program_.inputs;
    require(!inputs.empty() && inputs.size() <= kMaxInputs, "1 to 32 inputs");
    std::vector<bool> found(symbols.size(), false);
    for (size_t i = 0; i < inputs.size(); ++i) {
      require(exists(inputs[i]), "buffers that exist");
      const Buffer& input = program_.buffers[inputs[i]];
      require(input.space == Space::input && input.index == static_cast<int>(i),
              "an input buffer for each input");
      for (const Extent& size : input.shape)
        for (size_t s = 0; s < symbols.size(); ++s)
          if (size == Extent::of_symbol(static_cast<int>(s))) found[s] = true;
    }
    require(std::find(found.begin(), found.end(), false) == found.end(),
            "each symbol is the size of an input");
  }

  bool exists(int buffer) const {
    return buffer >= 0 && buffer < static_cast<int>(program_.buffers.size());
  }

  void extents(const Shape& shape) const {
    require(shape.size() <= kMaxDims, "at most 6 dimensions");
    for (const Extent& e : shape) {
      require(e.coefficient >= 0 && e.coefficient <= kMaxCoefficient,
              "sizes and strides of 0 or more");
      require(degree(e) <= kMaxDegree, "sizes of few symbols");
      for (size_t s = program_.symbols.size(); s < kMaxSymbols; ++s)
        require(e.exponent[s] == 0, "sizes of known symbols");
    }
  }

  // Sizes whose products, of any of them, 64 bits hold.
  void sizes(const Shape& shape) const {
    extents(shape);
    double elements = 1;
    for (const Extent& e : shape)
      elements *= static_cast<double>(std::max<int64_t>(e.coefficient, 1));
    require(elements <= static_cast<double>(kMaxElements), "sizes that memory may hold");
  }

  void buffer(const Buffer& b) const {
    sizes(b.shape);
    if (b.space == Space::constant) {
      require(b.index >= 0 && b.index < static_cast<int>(program_.constants.size()),
              "constants that exist");
      const Constant& constant = program_.constants[b.index];
      const auto count = product(b.shape).number();
      require(count && *count * bytes_of(b.dtype) == constant.bytes, "constants of their shape");
      const bool aligned =
          reinterpret_cast<uintptr_t>(constant.data) % static_cast<uintptr_t>(bytes_of(b.dtype)) ==
          0;
      require(constant.bytes == 0 || (constant.data && aligned), "constants at aligned addresses");
    } else if (b.space == Space::input) {
      require(b.index >= 0 && b.index < static_cast<int>(program_.inputs.size()) &&
                  &program_.buffers[program_.inputs[b.index]] == &b,
              "inputs that the plan has");
    }
  }

  // Every element of the view is one of its buffer, whatever the sizes.
  void inside(const View& view) const {
    require(exists(view.buffer), "buffers that exist");
    sizes(view.sizes);
    extents(view.strides);
    require(view.sizes.size() == view.strides.size(), "a stride for each size");
    require(view.offset >= 0 && view.offset <= kMaxCoefficient, "offsets of 0 or more");
    if (std::any_of(view.sizes.begin(), view.sizes.end(),
                    [](const Extent& size) { return size.coefficient == 0; })) {
      require(view.offset == 0, "empty operands at the start of their buffers");
      Extent rows(1);
      for (const Extent& size : view.sizes)
        if (size.coefficient != 0) rows = rows * size;
      bool once = true;
      for (const uint8_t exponent : rows.exponent) once = once && exponent <= 1;
      require(once && rows.coefficient <= kMaxEmptyRows, "empty operands of few rows");
      return;
    }
    if (inside_at_limits(view)) return;
    for (const auto& [powers, coefficient] : room_behind(view, program_.buffers[view.buffer]))
      require(coefficient >= 0, "operands inside their buffers");
  }

  // Whether a view lies inside a buffer of a fixed size (a table of positions) at the largest sizes
  // that the symbols' limits allow: at smaller ones it reaches less far.
  bool inside_at_limits(const View& view) const {
    Symbols most{};
    for (size_t s = 0; s < limits_.size(); ++s) most[s] = limits_[s].high;
    const auto bounded = [&](const Extent& size) {
      for (size_t s = 0; s < limits_.size(); ++s)
        if (size.depends_on(static_cast<int>(s)) && limits_[s].high < 0) return false;
      return true;
    };
    const Extent room = product(program_.buffers[view.buffer].shape);
    if (!room.is_number()) return false;
    // In 64 bits of a double: a buffer that is there has far fewer elements than 2^53.
    double last = static_cast<double>(view.offset);
    for (size_t d = 0; d < view.sizes.size(); ++d) {
      if (view.strides[d].number() == 0) continue;
      if (!bounded(view.sizes[d]) || !bounded(view.strides[d])) return false;
      last += (view.sizes[d].roughly(most) - 1) * view.strides[d].roughly(most);
    }
    return last < static_cast<double>(room.coefficient);
  }

  void step(size_t position) {
    const ProgramStep& step = program_.steps[position];
    require(step.kind && step.fields, "a step kind that this version knows");
    try {
      operands(step);
      step.kind->check({program_, step, limits_}, step.fields.get());
    } catch (const InvalidProgram& error) {
      throw InvalidProgram(std::string(error.what()) + " (step " + std::to_string(position) + ", " +
                           step.kind->name + ")");
    }
    for (size_t o = 0; o < step.operands.size(); ++o)
      if (step.writes(o) && !step.operands[o].absent()) {
        written_.insert(step.operands[o].buffer);
        require(++parts_[step.operands[o].buffer] <= kMaxParts, "buffers of at most 1024 parts");
      }
  }

  void operands(const ProgramStep& step) const {
    const auto& rules = step.kind->operands;
    const size_t count = step.operands.size();
    require(count <= kMaxOperands, "at most 32 operands");
    require(rules[0].many ? count + 1 >= rules.size() : count == rules.size(),
            "as many operands as the kind has");
    for (size_t o = 0; o < count; ++o) {
      const View& view = step.operands[o];
      const OperandRule& rule = step.rule(o);
      if (view.absent()) {
        require(rule.optional, "operands that are not optional");
        continue;
      }
      inside(view);
      const Buffer& b = program_.buffers[view.buffer];
      if (!rule.output) {
        require(written_.contains(view.buffer) || b.space == Space::constant,
                "operands that were computed before they are read");
        continue;
      }
      require(b.space == Space::arena || b.space == Space::output, "a result that may be written");
      require(b.space == Space::arena || outputs_.contains(view.buffer),
              "no other output than the plan's");
    }
  }

  const Program& program_;
  const std::vector<Limit>& limits_;
  std::set<int> written_, outputs_;
  std::map<int, int> parts_;  // how many steps write a buffer
};

}  // namespace

void check(const Program& program, const std::vector<Limit>& limits) {
  Checker(program, limits).whole();
}

Extent times(const Extent& a, const Extent& b) {
  int64_t coefficient;
  require(!__builtin_mul_overflow(a.coefficient, b.coefficient, &coefficient),
          "sizes that memory may hold");
  return a * b;
}

bool StepCheck::is(int operand, Dtypes dtypes) const {
  return std::find(dtypes.begin(), dtypes.end(), dtype(operand)) != dtypes.end();
}

double StepCheck::most(const Extent& size, int64_t unlimited) const {
  Symbols symbols{};
  for (size_t s = 0; s < limits_.size(); ++s)
    symbols[s] = limits_[s].high < 0 ? unlimited : limits_[s].high;
  return size.roughly(symbols);
}

void StepCheck::dense(int operand, Dtypes dtypes) const {
  if (!is(operand, dtypes)) {
    std::string what;
    for (const Dtype dtype : dtypes)
      what += std::string(what.empty() ? "" : " or ") + kDtypeNames[static_cast<int>(dtype)];
    what += std::string(", not ") + kDtypeNames[static_cast<int>(dtype(operand))];
    require(false, what.c_str());
  }
  require(view(operand).is_contiguous(), "contiguous operands");
}

void StepCheck::unit(int operand, size_t dim, const char* what) const {
  require(view(operand).strides[dim] == Extent(1) || sizes(operand)[dim] == Extent(1), what);
}

void StepCheck::table(int operand, Dtype dtype, std::initializer_list<int64_t> sizes) const {
  dense(operand, {dtype});
  require(is_constant(operand), "weights that are constants");
  if (this->sizes(operand) == Shape(sizes.begin(), sizes.end())) return;
  std::string what = "weights of sizes [";
  for (const int64_t size : sizes) what += (what.back() == '[' ? "" : ", ") + std::to_string(size);
  require(false, (what + "]").c_str());
}

std::span<const int32_t> StepCheck::integers(int operand) const {
  const View& table = view(operand);
  const std::byte* data = program_.constants[buffer(operand).index].data;
  return {reinterpret_cast<const int32_t*>(data) + table.offset,
          static_cast<size_t>(product(table.sizes).coefficient)};
}

Matrix StepCheck::rows(int operand) const {
  const Shape& shape = sizes(operand);
  require(!shape.empty(), "rows of numbers");
  const auto width = shape.back().number();
  require(width && *width > 0, "rows of a fixed width");
  return {product(shape, 0, shape.size() - 1), *width};
}

void StepCheck::elements(int operand, const Extent& size, const char* what) const {
  require(product(sizes(operand)) == size, what);
}

void StepCheck::result(int operand, const Matrix& matrix, bool tiled) const {
  dense(operand, {Dtype::f32, Dtype::u8});
  elements(operand, times(matrix.rows, matrix.width), "results of the operands' size");
  if (tiled) tiles(operand, matrix);
}

void StepCheck::tiles(int operand, const Matrix& matrix) const {
  constexpr int64_t kChunk = sparse_int8_linear::kTileChunk;
  const int64_t chunks = (matrix.width + kChunk - 1) / kChunk;
  require(dtype(operand) == Dtype::u8 && view(operand).offset == 0,
          "tiles that fill a uint8 buffer");
  require(buffer(operand).space == Space::arena, "tiles within the arena");
  require(product(buffer(operand).shape) == times(matrix.rows, 2 * kChunk * chunks),
          "tiles that fill their buffer");
}

}  // namespace fastrec::engine
