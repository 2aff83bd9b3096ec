// recurrent: one direction of a layer of GRU, LSTM or RNN (tanh or ReLU); the products with its
// inputs are a linear layer before it.
//
// x f32 [A, L, G * H]: the inputs' products and bias, gates in torch's order; weight f32 [G * H, H]
// and bias [G * H], constants, of the hidden state; start f32 [A, S * H], of zeros where it is
// absent; lengths i64 [A]: steps from there on leave the state as it is, and their result is 0; y
// f32 [A, L, S * H]. S is 2 for LSTM (hidden state, then cell), else 1. All contiguous.
#include <algorithm>
#include <memory>

#include "engine/loops/loops.h"
#include "engine/make_kind.h"
#include "engine/steps/middle.h"
#include "engine/steps/packed_linear.h"
#include "scratch.h"

namespace fastrec::engine {
namespace grouped = grouped_linear;
namespace {

using loops::Cell;
constexpr const char* kCellNames[] = {"gru", "lstm", "tanh", "relu"};

int64_t gates_of(Cell cell) { return cell == Cell::gru ? 3 : cell == Cell::lstm ? 4 : 1; }
int64_t states_of(Cell cell) { return cell == Cell::lstm ? 2 : 1; }

struct alignas(64) Block {
  float units[grouped::kLine];
};

struct Recurrent {
  static constexpr const char* name = "recurrent";
  enum { x, weight, bias, start, lengths, y };
  static constexpr OperandRule operands[] = {{.name = "x"},
                                             {.name = "weight"},
                                             {.name = "bias", .optional = true},
                                             {.name = "start", .optional = true},
                                             {.name = "lengths", .optional = true},
                                             {.name = "y", .output = true}};
  struct Fields {
    Cell cell = Cell::gru;
    bool backwards = false;

    template <class V>
    void each(V& visit) {
      visit("cell", cell, kCellNames);
      visit("backwards", backwards);
    }
  };
  static constexpr Traits traits = {.op = "grouped_linear",
                                    .shown = "recurrent",
                                    .users = Users::apart_of_two,
                                    .checked = {lengths, "lengths", x, 1},
                                    .one_row = true};

  static Rows rows(const Fields&) { return Rows::mixed; }
  static Isa isa(const Fields&, Tensors) { return grouped::select(grouped::Dtype::f32).isa; }

  static void check(const StepCheck& check, const Fields& fields) {
    const Shape &in = check.sizes(x), &of = check.sizes(weight), &to = check.sizes(y);
    require(in.size() == 3 && of.size() == 2 && to.size() == 3, "sequences, and a matrix");
    require(of[1].is_number() && of[1].coefficient > 0, "a hidden state");
    const int64_t size = of[1].coefficient, gates = gates_of(fields.cell) * size;
    const Extent states(states_of(fields.cell) * size);
    check.dense(x, {Dtype::f32});
    require(in[2] == Extent(gates), "the gates of each step");
    check.table(weight, Dtype::f32, {gates, size});
    if (check.has(bias)) check.table(bias, Dtype::f32, {gates});
    if (check.has(start)) {
      check.dense(start, {Dtype::f32});
      require(check.sizes(start) == Shape{in[0], states}, "a state for each sequence");
    }
    if (check.has(lengths)) {
      check.dense(lengths, {Dtype::i64});
      require(check.sizes(lengths) == Shape{in[0]}, "a length for each sequence");
    }
    check.dense(y, {Dtype::f32});
    require(to == (Shape{in[0], in[1], states}), "a state for each step");
  }

  static std::shared_ptr<void> prepare(const Fields&, Tensors operands) {
    return packed_weight(operands[weight], operands[bias]);
  }

  static Status run(const Fields& fields, Tensors operands, const void* prepared) {
    const PackedWeight& packed = *static_cast<const PackedWeight*>(prepared);
    const Tensor &in = operands[x], &ends = operands[lengths], &to = operands[y];
    const int64_t users = in.sizes[0], steps = in.sizes[1];
    if (ends.data)
      for (int64_t u = 0; u < users; ++u) {
        const int64_t length = ends.as<int64_t>()[u];
        if (length < 0 || length > steps) return {Fault::id_out_of_range, -1, length};
      }
    const int64_t work = to.count() * operands[weight].sizes[0];
    constexpr int64_t kParallelMultiplyAdds = 500'000;
    const int threads = work < kParallelMultiplyAdds ? 1 : num_threads();
    const int64_t tiles = std::max((users + grouped::kTileRows - 1) / grouped::kTileRows,
                                   std::min<int64_t>(threads, users));
    parallel_for(tiles, 1, threads, [&](int64_t begin, int64_t end) {
      for (int64_t t = begin; t < end; ++t)
        run_tile(fields, operands, packed, grouped::tile_row0(t, users, tiles),
                 grouped::tile_row0(t + 1, users, tiles));
    });
    return {};
  }

  static void cost(const Fields&, Tensors operands, Cost& cost) {
    const Tensor& in = operands[x];
    cost.macs = in.count() * operands[weight].sizes[1];
    cost.peak = "fp32";
  }

 private:
  static void run_tile(const Fields& fields, Tensors operands, const PackedWeight& packed,
                       int64_t first, int64_t last) {
    const grouped::Kernel& kernel = *packed.kernel;
    const loops::Loops& loops = loops::select();
    const Tensor &in = operands[x], &ends = operands[lengths], &to = operands[y];
    const int64_t steps = in.sizes[1], gates = in.sizes[2], width = to.sizes[2];
    const int64_t size = operands[weight].sizes[1];
    const int rows = static_cast<int>(last - first);
    const int64_t line_inputs = grouped::kLine * kernel.unit_inputs;
    const int64_t lines = (size + line_inputs - 1) / line_inputs * rows;
    const auto blocks = [](int64_t floats) {
      return (floats + grouped::kLine - 1) / grouped::kLine;
    };
    Block* const memory = scratch<Block>(lines + blocks(rows * gates) + blocks(rows * width));
    float* const own = memory[lines].units;
    float* const state = memory[lines + blocks(rows * gates)].units;
    if (operands[start].data)
      std::copy_n(operands[start].as<float>() + first * width, rows * width, state);
    else
      std::fill_n(state, rows * width, 0.0f);
    const grouped::Matrix products{own, grouped::Dtype::f32, gates, {0, 1}};
    for (int64_t i = 0; i < steps; ++i) {
      const int64_t t = fields.backwards ? steps - 1 - i : i;
      kernel.load(state, grouped::Dtype::f32, width, 1, size, rows, memory->units, grouped::kLine,
                  rows * grouped::kLine);
      for (int64_t panel = 0; panel < packed.panels.count; ++panel)
        grouped::multiply_tile(kernel, memory->units, rows, packed.panels, 0, panel, products, 0);
      for (int r = 0; r < rows; ++r) {
        float* const result = to.as<float>() + ((first + r) * steps + t) * width;
        if (ends.data && t >= ends.as<int64_t>()[first + r]) {
          std::fill_n(result, width, 0.0f);
          continue;
        }
        loops.cell(fields.cell, size, in.as<float>() + ((first + r) * steps + t) * gates,
                   own + r * gates, state + r * width);
        std::copy_n(state + r * width, width, result);
      }
    }
  }
};

}  // namespace

Kind recurrent_kind() { return make_kind<Recurrent>(); }

}  // namespace fastrec::engine
