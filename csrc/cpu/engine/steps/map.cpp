// map: an elementwise program over broadcast operands, interpreted a block at a time, so that a
// chain of any length reads and writes memory once.
//
// x: the inputs, expanded to the result's dims (stride 0 where they are broadcast); y f32, i64 or
// bool.
#include <algorithm>
#include <atomic>
#include <cmath>
#include <cstring>
#include <limits>

#include "engine/check.h"
#include "engine/make_kind.h"
#include "engine/map_program.h"
#include "parallel.h"

namespace fastrec::engine {
namespace {

constexpr int kBlock = 128;  // elements: 24 registers fit the first-level cache
// Elements times registers, some 3 us: below, a second thread costs more than it brings.
constexpr int64_t kParallelWork = 40'000;
constexpr int64_t kChunksPerThread = 4;

union Register {
  float f32[kBlock];
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

From from(const Register& r) { return {r.f32, r.i64}; }
To to(Register& r) { return {r.f32, r.i64}; }

// Whether a whole block can be read or written where it lies.
bool lies_so(const Tensor& tensor, int64_t stride, int n) {
  const bool known = tensor.dtype == Dtype::f32 || tensor.dtype == Dtype::i64;
  return n == kBlock && stride == 1 && known;
}

// The register's memory stands for elements of the other dtype, which a sound plan never asks for.
To block_of(const Tensor& tensor, int64_t at, Register& r) {
  if (tensor.dtype == Dtype::f32) return {tensor.as<float>() + at, r.i64};
  return {r.f32, tensor.as<int64_t>() + at};
}

// Operands with as few dims as their strides allow; the result is operand `count - 1`.
struct Loop {
  int dims = 0, count;
  int64_t sizes[kMaxDims];
  int64_t strides[kMaxRegisters + 1][kMaxDims];
};

Loop collapse(const Tensor* operands, int count, bool keep_dims) {
  const Tensor& result = operands[count - 1];
  Loop loop;
  loop.count = count;
  for (int d = 0; d < result.dims; ++d) {
    const int last = loop.dims - 1;
    bool merges = !keep_dims && loop.dims > 0;
    for (int o = 0; merges && o < count; ++o)
      merges = loop.strides[o][last] == operands[o].strides[d] * result.sizes[d];
    if (!merges) {
      loop.sizes[loop.dims] = 1;
      ++loop.dims;
    }
    const int into = loop.dims - 1;
    loop.sizes[into] *= result.sizes[d];
    for (int o = 0; o < count; ++o) loop.strides[o][into] = operands[o].strides[d];
  }
  if (loop.dims == 0) {
    loop.dims = 1;
    loop.sizes[0] = 1;
    for (int o = 0; o < count; ++o) loop.strides[o][0] = 0;
  }
  return loop;
}

template <class To, class From>
void load(To* to, const From* from, int64_t stride, int n) {
  if (stride == 1)
    for (int i = 0; i < n; ++i) to[i] = static_cast<To>(from[i]);
  else
    for (int i = 0; i < n; ++i) to[i] = static_cast<To>(from[i * stride]);
}

void load(Register& to, const Tensor& from, int64_t at, int64_t stride, int n) {
  switch (from.dtype) {
    case Dtype::f32:
      return load(to.f32, from.as<float>() + at, stride, n);
    case Dtype::i64:
      return load(to.i64, from.as<int64_t>() + at, stride, n);
    case Dtype::i32:
      return load(to.i64, from.as<int32_t>() + at, stride, n);
    case Dtype::u8:
    case Dtype::b8:
      return load(to.i64, from.as<uint8_t>() + at, stride, n);
    case Dtype::s8:
      return load(to.i64, from.as<int8_t>() + at, stride, n);
  }
}

void store(const Register& from, const Tensor& to, int64_t at, int64_t stride, int n) {
  switch (to.dtype) {
    case Dtype::f32:
      for (int i = 0; i < n; ++i) to.as<float>()[at + i * stride] = from.f32[i];
      return;
    case Dtype::i64:
      for (int i = 0; i < n; ++i) to.as<int64_t>()[at + i * stride] = from.i64[i];
      return;
    default:  // the front end makes no other results than these and bool
      for (int i = 0; i < n; ++i) to.as<uint8_t>()[at + i * stride] = from.i64[i] != 0;
  }
}

// Integers wrap, as in torch.
int64_t wrap(uint64_t value) { return static_cast<int64_t>(value); }
uint64_t bits(int64_t value) { return static_cast<uint64_t>(value); }

// As in Python. By 0: 0, where the caller refuses the call.
int64_t floor_quotient(int64_t a, int64_t b) {
  if (b == 0) return 0;
  if (b == -1) return wrap(0 - bits(a));  // the one quotient that may overflow
  return a / b - (a % b != 0 && (a < 0) != (b < 0));
}
int64_t integer_remainder(int64_t a, int64_t b) {
  if (b == 0) return 0;
  return wrap(bits(a) - bits(floor_quotient(a, b)) * bits(b));
}
float remainder_of(float a, float b) {
  const float rest = std::fmod(a, b);
  return rest != 0 && (rest < 0) != (b < 0) ? rest + b : rest;
}
float floor_quotient(float a, float b) {
  if (b == 0) return a / b;
  const float rest = std::fmod(a, b);
  float quotient = (a - rest) / b;
  if (rest != 0 && (b < 0) != (rest < 0)) quotient -= 1;
  if (quotient == 0) return std::copysign(0.0f, a / b);
  const float down = std::floor(quotient);
  return quotient - down > 0.5f ? down + 1 : down;
}
// Towards 0; what int64 cannot hold is the smallest integer.
int64_t whole(float value) {
  constexpr float kLimit = 9223372036854775808.0f;
  if (!(value >= -kLimit && value < kLimit)) return std::numeric_limits<int64_t>::min();
  return static_cast<int64_t>(value);
}

// Whole blocks are computed, whatever n: what lies beyond is never stored.
#define FASTREC_EACH(field, expression) \
  for (int i = 0; i < kBlock; ++i) to.field[i] = (expression)

void execute(MapOp op, To to, From a, From b, From c) {
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
      FASTREC_EACH(f32, a.f32[i] > b.f32[i] || a.f32[i] != a.f32[i] ? a.f32[i] : b.f32[i]);
      return;
    case MapOp::min_f32:
      FASTREC_EACH(f32, a.f32[i] < b.f32[i] || a.f32[i] != a.f32[i] ? a.f32[i] : b.f32[i]);
      return;
    case MapOp::neg_f32:
      FASTREC_EACH(f32, -a.f32[i]);
      return;
    case MapOp::abs_f32:
      FASTREC_EACH(f32, std::fabs(a.f32[i]));
      return;
    case MapOp::exp_f32:
      FASTREC_EACH(f32, std::exp(a.f32[i]));
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
      FASTREC_EACH(f32, std::tanh(a.f32[i]));
      return;
    case MapOp::sigmoid_f32:
      FASTREC_EACH(f32, 1.0f / (1.0f + std::exp(-a.f32[i])));
      return;
    case MapOp::relu_f32:
      FASTREC_EACH(f32, a.f32[i] < 0.0f ? 0.0f : a.f32[i]);
      return;
    case MapOp::gelu_f32:
      FASTREC_EACH(f32, 0.5f * a.f32[i] * (1.0f + std::erf(a.f32[i] * 0.70710678118654752f)));
      return;
    case MapOp::silu_f32:
      FASTREC_EACH(f32, a.f32[i] / (1.0f + std::exp(-a.f32[i])));
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
      FASTREC_EACH(f32, std::erf(a.f32[i]));
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

bool divides(const MapInstruction& instruction) {
  return instruction.op == MapOp::div_i64 || instruction.op == MapOp::rem_i64;
}

Status run_program(const std::vector<MapInstruction>& program, Tensors operands) {
  const int inputs = static_cast<int>(operands.size()) - 1;
  const int instructions = static_cast<int>(program.size());
  bool has_index = false;
  for (const MapInstruction& instruction : program) has_index |= instruction.op == MapOp::index;
  const Loop loop = collapse(operands.data(), inputs + 1, has_index);
  const Tensor& result = operands[inputs];
  const int inner = loop.dims - 1;
  const int64_t width = loop.sizes[inner];
  int64_t rows = 1;
  for (int d = 0; d < inner; ++d) rows *= loop.sizes[d];
  // A row may be long (a contiguous tensor is one row): blocks of rows are what threads share.
  const int64_t blocks_a_row = (width + kBlock - 1) / kBlock;
  const int64_t blocks = rows * blocks_a_row;
  const int64_t work = rows * width * (inputs + instructions + 1);
  const int threads = work < kParallelWork ? 1 : num_threads();
  const int64_t grain = std::max<int64_t>(1, blocks / (threads * kChunksPerThread));

  std::atomic<bool> by_zero{false};
  parallel_for(blocks, grain, threads, [&](int64_t begin, int64_t end) {
    Register registers[kMaxRegisters];
    From values[kMaxRegisters];
    for (int r = 0; r < inputs + instructions; ++r) values[r] = from(registers[r]);
    // Constants are filled once, not once a block.
    for (int p = 0; p < instructions; ++p) {
      Register& to = registers[inputs + p];
      if (program[p].op == MapOp::number) std::fill_n(to.f32, kBlock, program[p].number);
      if (program[p].op == MapOp::integer) std::fill_n(to.i64, kBlock, program[p].integer);
    }
    for (int64_t block = begin; block < end; ++block) {
      const int64_t at = block % blocks_a_row * kBlock;
      const int n = static_cast<int>(std::min<int64_t>(kBlock, width - at));
      int64_t position[kMaxDims];
      int64_t row = block / blocks_a_row;
      for (int d = inner - 1; d >= 0; --d) {
        position[d] = row % loop.sizes[d];
        row /= loop.sizes[d];
      }
      position[inner] = at;
      const auto start = [&](int o) {
        int64_t offset = 0;
        for (int d = 0; d < loop.dims; ++d) offset += position[d] * loop.strides[o][d];
        return offset;
      };
      for (int o = 0; o < inputs; ++o) {
        const int64_t stride = loop.strides[o][inner];
        if (instructions > 0 && lies_so(operands[o], stride, n)) {
          const To there = block_of(operands[o], start(o), registers[o]);
          values[o] = {there.f32, there.i64};
        } else {
          load(registers[o], operands[o], start(o), stride, n);
          values[o] = from(registers[o]);
        }
      }
      // The last instruction that computes may write the result itself.
      const bool direct = instructions > 0 && lies_so(result, loop.strides[inputs][inner], n) &&
                          kMapOpReads[static_cast<int>(program.back().op)] > 0;
      for (int p = 0; p < instructions; ++p) {
        const MapInstruction& instruction = program[p];
        Register& own = registers[inputs + p];
        if (instruction.op == MapOp::index) {
          const bool along = instruction.a == inner;
          for (int i = 0; i < n; ++i) own.i64[i] = position[instruction.a] + (along ? i : 0);
        } else {
          const int64_t* const by = values[instruction.b].i64;
          if (divides(instruction) && std::find(by, by + n, 0) != by + n)
            by_zero.store(true, std::memory_order_relaxed);
          const bool last = direct && p + 1 == instructions;
          execute(instruction.op, last ? block_of(result, start(inputs), own) : to(own),
                  values[instruction.a], values[instruction.b], values[instruction.c]);
        }
      }
      if (!direct)
        store(registers[inputs + instructions - 1], result, start(inputs),
              loop.strides[inputs][inner], n);
    }
  });
  return by_zero ? Status{Fault::division_by_zero} : Status{};
}

struct Map {
  static constexpr const char* name = "map";
  static constexpr OperandRule operands[] = {{.name = "x", .many = true},
                                             {.name = "y", .output = true}};
  struct Fields {
    MapProgram program;

    template <class V>
    void each(V& visit) {
      visit("program", program);
    }
  };
  static constexpr Traits traits = {.op = "", .shown = "map", .users = Users::apart};

  static Rows rows(const Fields&) { return Rows::elements; }
  static bool reads_index(const Fields& fields, int dim) { return fields.program.reads_index(dim); }

  static void check(const StepCheck& check, const Fields& fields) {
    const int y = check.count() - 1;
    require(check.is(y, {Dtype::f32, Dtype::i64, Dtype::b8}), "maps to float32, int64 or bool");
    for (size_t d = 0; d < check.sizes(y).size(); ++d)
      require(check.view(y).strides[d].coefficient > 0 || check.sizes(y)[d].coefficient <= 1,
              "a result with a place for each element");
    for (int o = 0; o < y; ++o)
      require(check.sizes(o) == check.sizes(y), "operands expanded to the result's shape");
    fields.program.check(y, static_cast<int>(check.sizes(y).size()));
  }

  static Status run(const Fields& fields, Tensors operands, const void*) {
    return run_program(fields.program.instructions, operands);
  }

  static std::shared_ptr<const void> moved_on(const Fields& fields, int inputs, int dim) {
    if (!fields.program.reads_index(dim)) return nullptr;
    return map_fields(fields.program.moved_on(inputs, dim));
  }

  static void cost(const Fields&, Tensors, Cost& cost) { cost.peak = ""; }
};

}  // namespace

std::shared_ptr<const void> map_fields(MapProgram program) {
  return std::make_shared<Map::Fields>(Map::Fields{std::move(program)});
}

Kind map_kind() { return make_kind<Map>(); }

}  // namespace fastrec::engine
