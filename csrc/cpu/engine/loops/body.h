// The loops, compiled for one instruction set: a file that includes this names
// FASTREC_LOOPS_TARGET. No function of it is visible elsewhere, so that no code is linked into
// another instruction set's.
#include <algorithm>
#include <cmath>
#include <cstring>
#include <limits>

#include "activation_quantize/activation_quantize.h"
#include "engine/loops/functions.h"
#include "engine/loops/loops.h"

namespace fastrec::engine::loops {
namespace {

constexpr int kLanes = 16;  // loops run in whole registers, whatever the number of elements

union Register {
  alignas(64) float f32[kBlock];
  int64_t i64[kBlock];
};

// A block of elements: a register, or where they lie in an operand anyway.
template <class F32, class I64>
struct Block {
  F32* f32;
  I64* i64;
};
using From = Block<const float, const int64_t>;
using To = Block<float, int64_t>;

inline From from(const Register& r) { return {r.f32, r.i64}; }
inline To to(Register& r) { return {r.f32, r.i64}; }

// The register's memory stands for elements of the other dtype, which a sound plan never asks for.
inline To block_of(const Tensor& tensor, int64_t at, Register& r) {
  if (tensor.dtype == Dtype::f32) return {tensor.as<float>() + at, r.i64};
  return {r.f32, tensor.as<int64_t>() + at};
}

// Integers wrap, as in torch.
inline int64_t wrap(uint64_t value) { return static_cast<int64_t>(value); }
inline uint64_t bits(int64_t value) { return static_cast<uint64_t>(value); }

// As in Python. By 0: 0, where the caller refuses the call.
inline int64_t floor_quotient(int64_t a, int64_t b) {
  if (b == 0) return 0;
  if (b == -1) return wrap(0 - bits(a));  // the one quotient that may overflow
  return a / b - (a % b != 0 && (a < 0) != (b < 0));
}
inline int64_t integer_remainder(int64_t a, int64_t b) {
  if (b == 0) return 0;
  return wrap(bits(a) - bits(floor_quotient(a, b)) * bits(b));
}
inline float remainder_of(float a, float b) {
  const float rest = std::fmod(a, b);
  return rest != 0 && (rest < 0) != (b < 0) ? rest + b : rest;
}
inline float floor_quotient(float a, float b) {
  if (b == 0) return a / b;
  const float rest = std::fmod(a, b);
  float quotient = (a - rest) / b;
  if (rest != 0 && (b < 0) != (rest < 0)) quotient -= 1;
  if (quotient == 0) return std::copysign(0.0f, a / b);
  const float down = std::floor(quotient);
  return quotient - down > 0.5f ? down + 1 : down;
}
// Towards 0; what int64 cannot hold is the smallest integer.
inline int64_t whole(float value) {
  constexpr float kLimit = 9223372036854775808.0f;
  if (!(value >= -kLimit && value < kLimit)) return std::numeric_limits<int64_t>::min();
  return static_cast<int64_t>(value);
}

template <class To, class From>
FASTREC_LOOPS_TARGET inline void load_row(To* to, const From* from, int64_t stride, int64_t n) {
  if (stride == 1)
    for (int64_t i = 0; i < n; ++i) to[i] = static_cast<To>(from[i]);
  else if (stride == 0)
    std::fill_n(to, n, static_cast<To>(*from));
  else
    for (int64_t i = 0; i < n; ++i) to[i] = static_cast<To>(from[i * stride]);
}

// Rows of an operand, or of a part of one, whose elements and rows lie so far apart.
struct Rows {
  int64_t at, row_stride, stride, rows, width;
};

template <class To, class From>
FASTREC_LOOPS_TARGET inline void load_rows(To* to, const From* from, const Rows& r) {
  if (r.row_stride == 0 && r.stride == 0) return load_row(to, from + r.at, 0, r.rows * r.width);
  if (r.width == 1) return load_row(to, from + r.at, r.row_stride, r.rows);
  for (int64_t row = 0; row < r.rows; ++row)
    load_row(to + row * r.width, from + r.at + row * r.row_stride, r.stride, r.width);
}

FASTREC_LOOPS_TARGET void load(Register& to, const Tensor& from, const Rows& rows) {
  switch (from.dtype) {
    case Dtype::f32:
      return load_rows(to.f32, from.as<float>(), rows);
    case Dtype::i64:
      return load_rows(to.i64, from.as<int64_t>(), rows);
    case Dtype::i32:
      return load_rows(to.i64, from.as<int32_t>(), rows);
    case Dtype::u8:
    case Dtype::b8:
      return load_rows(to.i64, from.as<uint8_t>(), rows);
    case Dtype::s8:
      return load_rows(to.i64, from.as<int8_t>(), rows);
  }
}

template <class To, class From, class Convert>
FASTREC_LOOPS_TARGET inline void store_rows(const From* from, To* to, const Rows& r,
                                            const Convert& convert) {
  for (int64_t row = 0; row < r.rows; ++row) {
    To* const there = to + r.at + row * r.row_stride;
    if (r.stride == 1)
      for (int64_t i = 0; i < r.width; ++i) there[i] = convert(from[row * r.width + i]);
    else
      for (int64_t i = 0; i < r.width; ++i) there[i * r.stride] = convert(from[row * r.width + i]);
  }
}

FASTREC_LOOPS_TARGET void store(const Register& from, const Tensor& to, const Rows& rows) {
  const auto same = [](auto value) { return value; };
  switch (to.dtype) {
    case Dtype::f32:
      return store_rows(from.f32, to.as<float>(), rows, same);
    case Dtype::i64:
      return store_rows(from.i64, to.as<int64_t>(), rows, same);
    default:  // the front end makes no other results than these and bool
      return store_rows(from.i64, to.as<uint8_t>(), rows,
                        [](int64_t value) { return static_cast<uint8_t>(value != 0); });
  }
}

// A copy without a register between; `bytes` an element.
FASTREC_LOOPS_TARGET void copy(const Tensor& from, const Rows& read, const Tensor& to,
                               const Rows& write) {
  const int64_t bytes = bytes_of(to.dtype);
  const bool dense = read.stride == 1 && write.stride == 1;
  if (dense &&
      (read.rows == 1 || (read.row_stride == read.width && write.row_stride == read.width)))
    return void(std::memcpy(to.data + write.at * bytes, from.data + read.at * bytes,
                            read.rows * read.width * bytes));
  for (int64_t row = 0; row < read.rows; ++row) {
    const int64_t source = read.at + row * read.row_stride,
                  there = write.at + row * write.row_stride;
    if (dense) {
      std::memcpy(to.data + there * bytes, from.data + source * bytes, read.width * bytes);
      continue;
    }
    if (bytes == 4)
      for (int64_t i = 0; i < read.width; ++i)
        to.as<uint32_t>()[there + i * write.stride] = from.as<uint32_t>()[source + i * read.stride];
    else
      for (int64_t i = 0; i < read.width; ++i)
        std::memcpy(to.data + (there + i * write.stride) * bytes,
                    from.data + (source + i * read.stride) * bytes, bytes);
  }
}

inline void gelu(const float* x, float* y, int n) {
  activation_quantize::Call call{};
  call.x = x;
  call.x_type = activation_quantize::Input::f32;
  call.activation = activation_quantize::Activation::gelu;
  call.y = y;
  call.y_type = activation_quantize::Output::f32;
  call.count = n;
  activation_quantize::select().elements(call, 0, n);
}

// Whole registers are computed, whatever n: what lies beyond is never stored.
#define FASTREC_EACH(field, expression) \
  for (int i = 0; i < n; ++i) to.field[i] = (expression)

FASTREC_LOOPS_TARGET void execute(MapOp op, To to, From a, From b, From c, int n) {
  switch (op) {
    case MapOp::add_f32:
      FASTREC_EACH(f32, a.f32[i] + b.f32[i]);
      return;
    case MapOp::sub_f32:
      FASTREC_EACH(f32, a.f32[i] - b.f32[i]);
      return;
    case MapOp::mul_f32:
      FASTREC_EACH(f32, a.f32[i] * b.f32[i]);
      return;
    case MapOp::div_f32:
      FASTREC_EACH(f32, a.f32[i] / b.f32[i]);
      return;
    // As torch: a NaN on either side wins.
    case MapOp::max_f32:
      FASTREC_EACH(f32, select((a.f32[i] > b.f32[i]) | (a.f32[i] != a.f32[i]), a.f32[i], b.f32[i]));
      return;
    case MapOp::min_f32:
      FASTREC_EACH(f32, select((a.f32[i] < b.f32[i]) | (a.f32[i] != a.f32[i]), a.f32[i], b.f32[i]));
      return;
    case MapOp::neg_f32:
      FASTREC_EACH(f32, -a.f32[i]);
      return;
    case MapOp::abs_f32:
      FASTREC_EACH(f32, std::fabs(a.f32[i]));
      return;
    case MapOp::exp_f32:
      FASTREC_EACH(f32, exp(a.f32[i]));
      return;
    case MapOp::log_f32:
      FASTREC_EACH(f32, std::log(a.f32[i]));
      return;
    case MapOp::sqrt_f32:
      FASTREC_EACH(f32, std::sqrt(a.f32[i]));
      return;
    case MapOp::rsqrt_f32:
      FASTREC_EACH(f32, 1.0f / std::sqrt(a.f32[i]));
      return;
    case MapOp::tanh_f32:
      FASTREC_EACH(f32, tanh(a.f32[i]));
      return;
    case MapOp::sigmoid_f32:
      FASTREC_EACH(f32, sigmoid(a.f32[i]));
      return;
    case MapOp::relu_f32:
      FASTREC_EACH(f32, a.f32[i] < 0.0f ? 0.0f : a.f32[i]);
      return;
    case MapOp::gelu_f32:
      gelu(a.f32, to.f32, n);
      return;
    case MapOp::silu_f32:
      FASTREC_EACH(f32, silu(a.f32[i]));
      return;
    case MapOp::pow_f32:
      FASTREC_EACH(f32, std::pow(a.f32[i], b.f32[i]));
      return;
    case MapOp::rem_f32:
      FASTREC_EACH(f32, remainder_of(a.f32[i], b.f32[i]));
      return;
    case MapOp::floor_div_f32:
      FASTREC_EACH(f32, floor_quotient(a.f32[i], b.f32[i]));
      return;
    case MapOp::erf_f32:
      FASTREC_EACH(f32, erf(a.f32[i]));
      return;
    case MapOp::sin_f32:
      FASTREC_EACH(f32, std::sin(a.f32[i]));
      return;
    case MapOp::cos_f32:
      FASTREC_EACH(f32, std::cos(a.f32[i]));
      return;
    case MapOp::floor_f32:
      FASTREC_EACH(f32, std::floor(a.f32[i]));
      return;
    case MapOp::ceil_f32:
      FASTREC_EACH(f32, std::ceil(a.f32[i]));
      return;
    case MapOp::trunc_f32:
      FASTREC_EACH(f32, std::trunc(a.f32[i]));
      return;
    case MapOp::round_f32:
      FASTREC_EACH(f32, std::nearbyint(a.f32[i]));
      return;
    case MapOp::expm1_f32:
      FASTREC_EACH(f32, std::expm1(a.f32[i]));
      return;
    case MapOp::log1p_f32:
      FASTREC_EACH(f32, std::log1p(a.f32[i]));
      return;
    case MapOp::div_i64:
      FASTREC_EACH(i64, floor_quotient(a.i64[i], b.i64[i]));
      return;
    case MapOp::rem_i64:
      FASTREC_EACH(i64, integer_remainder(a.i64[i], b.i64[i]));
      return;
    case MapOp::xor_i64:
      FASTREC_EACH(i64, a.i64[i] ^ b.i64[i]);
      return;
    case MapOp::to_i64:
      FASTREC_EACH(i64, whole(a.f32[i]));
      return;
    case MapOp::lt_f32:
      FASTREC_EACH(i64, a.f32[i] < b.f32[i]);
      return;
    case MapOp::le_f32:
      FASTREC_EACH(i64, a.f32[i] <= b.f32[i]);
      return;
    case MapOp::eq_f32:
      FASTREC_EACH(i64, a.f32[i] == b.f32[i]);
      return;
    case MapOp::where_f32:
      FASTREC_EACH(f32, a.i64[i] ? b.f32[i] : c.f32[i]);
      return;
    case MapOp::add_i64:
      FASTREC_EACH(i64, wrap(bits(a.i64[i]) + bits(b.i64[i])));
      return;
    case MapOp::sub_i64:
      FASTREC_EACH(i64, wrap(bits(a.i64[i]) - bits(b.i64[i])));
      return;
    case MapOp::mul_i64:
      FASTREC_EACH(i64, wrap(bits(a.i64[i]) * bits(b.i64[i])));
      return;
    case MapOp::max_i64:
      FASTREC_EACH(i64, std::max(a.i64[i], b.i64[i]));
      return;
    case MapOp::min_i64:
      FASTREC_EACH(i64, std::min(a.i64[i], b.i64[i]));
      return;
    case MapOp::lt_i64:
      FASTREC_EACH(i64, a.i64[i] < b.i64[i]);
      return;
    case MapOp::le_i64:
      FASTREC_EACH(i64, a.i64[i] <= b.i64[i]);
      return;
    case MapOp::eq_i64:
      FASTREC_EACH(i64, a.i64[i] == b.i64[i]);
      return;
    case MapOp::where_i64:
      FASTREC_EACH(i64, a.i64[i] ? b.i64[i] : c.i64[i]);
      return;
    case MapOp::and_i64:
      FASTREC_EACH(i64, a.i64[i] & b.i64[i]);
      return;
    case MapOp::or_i64:
      FASTREC_EACH(i64, a.i64[i] | b.i64[i]);
      return;
    case MapOp::not_i64:
      FASTREC_EACH(i64, !a.i64[i]);
      return;
    case MapOp::to_f32:
      FASTREC_EACH(f32, static_cast<float>(a.i64[i]));
      return;
    case MapOp::number:
    case MapOp::integer:
    case MapOp::index:
      return;  // filled by the caller
  }
}

#undef FASTREC_EACH

// Where a block lies, counted on from block to block.
class Walk {
 public:
  Walk(const MapCall& call, int64_t block) : call_(call) {
    for (int d = call.dims - 1; d >= 0; --d) {
      const int64_t blocks = call.blocks_along(d);
      place_[d] = block % blocks * step(d);
      block /= blocks;
    }
  }

  void next() {
    for (int d = call_.dims - 1; d >= 0; --d) {
      place_[d] += step(d);
      if (place_[d] < call_.sizes[d]) return;
      place_[d] = 0;
    }
  }

  int64_t at(int d) const { return place_[d]; }
  Rows rows_of(int operand) const {
    const int64_t* const strides = call_.strides[operand];
    const int last = call_.dims - 1;
    Rows rows{0, strides[last - 1], strides[last],
              std::min(call_.block_rows, call_.sizes[last - 1] - place_[last - 1]),
              std::min(call_.block_width, call_.sizes[last] - place_[last])};
    for (int d = 0; d <= last; ++d) rows.at += place_[d] * strides[d];
    return rows;
  }

 private:
  int64_t step(int d) const {
    return d == call_.dims - 1 ? call_.block_width : d == call_.dims - 2 ? call_.block_rows : 1;
  }

  const MapCall& call_;
  int64_t place_[kMaxDims];
};

// Whether a block can be read or written where it lies, in whole registers.
inline bool lies_so(const Tensor& tensor, const Rows& r) {
  const bool known = tensor.dtype == Dtype::f32 || tensor.dtype == Dtype::i64;
  return known && r.stride == 1 && (r.rows == 1 || r.row_stride == r.width) &&
         r.rows * r.width % kLanes == 0;
}

FASTREC_LOOPS_TARGET void positions(const Walk& walk, int dim, int dims, const Rows& rows,
                                    int64_t* to) {
  const int64_t first = walk.at(dim);
  const int64_t along_row = dim == dims - 1, along_rows = dim == dims - 2;
  for (int64_t r = 0; r < rows.rows; ++r)
    for (int64_t i = 0; i < rows.width; ++i)
      to[r * rows.width + i] = first + r * along_rows + i * along_row;
}

inline bool divides(const MapInstruction& instruction) {
  return instruction.op == MapOp::div_i64 || instruction.op == MapOp::rem_i64;
}

FASTREC_LOOPS_TARGET bool map(const MapCall& call, int64_t begin, int64_t end) {
  const std::vector<MapInstruction>& program = *call.program;
  const int inputs = call.inputs, instructions = static_cast<int>(program.size());
  const Tensor& result = call.operands[inputs];
  if (instructions == 0 && call.operands[0].dtype == result.dtype) {
    for (Walk walk(call, begin); begin < end; ++begin, walk.next())
      copy(call.operands[0], walk.rows_of(0), result, walk.rows_of(1));
    return true;
  }
  bool by_zero = false;
  Register registers[kMaxRegisters];
  From values[kMaxRegisters];
  for (int r = 0; r < inputs + instructions; ++r) values[r] = from(registers[r]);
  // Constants are filled once, not once a block.
  for (int p = 0; p < instructions; ++p) {
    Register& own = registers[inputs + p];
    if (program[p].op == MapOp::number) std::fill_n(own.f32, kBlock, program[p].number);
    if (program[p].op == MapOp::integer) std::fill_n(own.i64, kBlock, program[p].integer);
  }
  for (Walk walk(call, begin); begin < end; ++begin, walk.next()) {
    for (int o = 0; o < inputs; ++o) {
      const Rows rows = walk.rows_of(o);
      if (instructions > 0 && lies_so(call.operands[o], rows)) {
        const To there = block_of(call.operands[o], rows.at, registers[o]);
        values[o] = {there.f32, there.i64};
      } else {
        load(registers[o], call.operands[o], rows);
        values[o] = from(registers[o]);
      }
    }
    const Rows out = walk.rows_of(inputs);
    const int n = static_cast<int>((out.rows * out.width + kLanes - 1) / kLanes * kLanes);
    // The last instruction that computes may write the result itself.
    const bool direct = instructions > 0 && lies_so(result, out) &&
                        kMapOpReads[static_cast<int>(program.back().op)] > 0;
    for (int p = 0; p < instructions; ++p) {
      const MapInstruction& instruction = program[p];
      Register& own = registers[inputs + p];
      const int64_t* const by = values[instruction.b].i64;
      if (divides(instruction)) by_zero |= std::count(by, by + out.rows * out.width, 0) > 0;
      if (instruction.op == MapOp::index)
        positions(walk, instruction.a + call.dims - result.dims, call.dims, out, own.i64);
      else
        execute(instruction.op,
                direct && p + 1 == instructions ? block_of(result, out.at, own) : to(own),
                values[instruction.a], values[instruction.b], values[instruction.c], n);
    }
    if (!direct) store(registers[inputs + instructions - 1], result, out);
  }
  return !by_zero;
}

// The sum of a row: several partial ones, so that an addition need not wait for the one before.
FASTREC_LOOPS_TARGET inline double sum_of(const float* row, int64_t count) {
  constexpr int kSums = 8;
  double sums[kSums] = {};
  int64_t n = 0;
  for (; n + kSums <= count; n += kSums)
    for (int i = 0; i < kSums; ++i) sums[i] += row[n + i];
  for (; n < count; ++n) sums[0] += row[n];
  return ((sums[0] + sums[1]) + (sums[2] + sums[3])) + ((sums[4] + sums[5]) + (sums[6] + sums[7]));
}

// Of a maximum a NaN wins, as in torch.
inline bool wins(Reduction reduction, float value, float best) {
  return reduction == Reduction::min ? value < best : value > best;
}

template <Reduction reduction>
FASTREC_LOOPS_TARGET inline void extremum(const float* x, int64_t count, int64_t width,
                                          float* result) {
  constexpr float kInfinity = std::numeric_limits<float>::infinity();
  std::fill_n(result, width, reduction == Reduction::min ? kInfinity : -kInfinity);
  for (int64_t n = 0; n < count; ++n, x += width)
    for (int64_t c = 0; c < width; ++c)
      result[c] = select(wins(reduction, x[c], result[c]) | (x[c] != x[c]), x[c], result[c]);
}

FASTREC_LOOPS_TARGET void reduce(Reduction reduction, const float* x, int64_t count, int64_t width,
                                 double* total, float* result) {
  if (reduction == Reduction::max) return extremum<Reduction::max>(x, count, width, result);
  if (reduction == Reduction::min) return extremum<Reduction::min>(x, count, width, result);
  const double divisor = reduction == Reduction::mean ? static_cast<double>(count) : 1.0;
  if (width == 1) {
    *result = static_cast<float>(sum_of(x, count) / divisor);
    return;
  }
  std::fill_n(total, width, 0.0);
  for (int64_t n = 0; n < count; ++n, x += width)
    for (int64_t c = 0; c < width; ++c) total[c] += x[c];
  for (int64_t c = 0; c < width; ++c) result[c] = static_cast<float>(total[c] / divisor);
}

FASTREC_LOOPS_TARGET void cell(Cell cell, int64_t size, const float* in, const float* own,
                               float* state) {
  if (cell == Cell::gru) {
    for (int64_t i = 0; i < size; ++i) {
      const float reset = sigmoid(in[i] + own[i]);
      const float keep = sigmoid(in[size + i] + own[size + i]);
      const float next = tanh(in[2 * size + i] + reset * own[2 * size + i]);
      state[i] = next + keep * (state[i] - next);
    }
  } else if (cell == Cell::lstm) {
    for (int64_t i = 0; i < size; ++i) {
      const float input = sigmoid(in[i] + own[i]), forget = sigmoid(in[size + i] + own[size + i]);
      const float next = tanh(in[2 * size + i] + own[2 * size + i]);
      const float output = sigmoid(in[3 * size + i] + own[3 * size + i]);
      const float memory = forget * state[size + i] + input * next;
      state[size + i] = memory;
      state[i] = output * tanh(memory);
    }
  } else if (cell == Cell::tanh) {
    for (int64_t i = 0; i < size; ++i) state[i] = tanh(in[i] + own[i]);
  } else {
    for (int64_t i = 0; i < size; ++i) {
      const float sum = in[i] + own[i];
      state[i] = sum < 0 ? 0 : sum;
    }
  }
}

}  // namespace
}  // namespace fastrec::engine::loops
