// linear: y = x W^T + b in fp32, on the micro-kernel of grouped_linear with one group.
// linear_bf16: the same for a weight that bfloat16 holds exactly. Where the CPU multiplies bf16, x
// is rounded to it too; sums stay fp32. Elsewhere it is linear.
//
// operands  x [.., K] f32 contiguous; W [N, K] f32, a constant; b [N] f32 if integers[0]; result
//           f32 [.., N] contiguous
// integers  whether there is a bias, activation (activation_quantize's)
//
// The weight is packed into panels once, when the plan is made; few outputs use it as it lies.
#include <algorithm>
#include <bit>
#include <memory>
#include <stdexcept>
#include <vector>

#include "activation_quantize/activation_quantize.h"
#include "element.h"
#include "engine/steps.h"
#include "grouped_linear/grouped_linear.h"
#include "parallel.h"
#include "scratch.h"

namespace fastrec::engine {
namespace {

namespace grouped = grouped_linear;

struct Packed {
  const grouped::Kernel* kernel;
  std::vector<float> memory;
  grouped::Panels panels;
};

struct alignas(64) Line {
  float units[grouped::kLine];
};

// Below this many multiply-adds (some 10 us) a second thread costs more than it brings.
constexpr int64_t kParallelMultiplyAdds = 500'000;
constexpr int64_t kParallelPackFloats = 16 * 1024;
constexpr int64_t kChunksPerThread = 16;
// A panel computes 32 outputs even where there is one, and x is laid out for it first: a scorer's
// last layer (1024 -> 1, 50 rows) took 18 us so, and takes 2 us as dot products.
constexpr int64_t kFewOutputs = 4;

// Row x weight as a product of vectors: `dots` takes the weight's row for its x, and the rows of x,
// kLine at a time, for its weight.
void run_few_outputs(const Tensor& x, const Tensor& weight, const float* bias, const Tensor& y,
                     const grouped::Kernel& kernel, const activation_quantize::Call& activation) {
  const int64_t outputs = weight.sizes[0], inputs = weight.sizes[1];
  const int64_t rows = x.count() / inputs;
  const auto activate = activation_quantize::select().elements;
  const int threads = rows * outputs * inputs < kParallelMultiplyAdds ? 1 : num_threads();
  const int64_t blocks = (rows + grouped::kLine - 1) / grouped::kLine;
  parallel_for(blocks, 1, threads, [&](int64_t begin, int64_t end) {
    for (int64_t b = begin; b < end; ++b) {
      const int64_t row0 = b * grouped::kLine;
      const int count = static_cast<int>(std::min<int64_t>(grouped::kLine, rows - row0));
      float* const to = y.as<float>() + row0 * outputs;
      for (int64_t n = 0; n < outputs; ++n) {
        float start[grouped::kLine], sums[grouped::kLine];
        std::fill(start, start + grouped::kLine, bias ? bias[n] : 0.0f);
        kernel.dots(weight.as<float>() + n * inputs, inputs, x.as<float>() + row0 * inputs,
                    grouped::Dtype::f32, inputs, count, 1, start, sums, grouped::kLine);
        for (int r = 0; r < count; ++r) to[r * outputs + n] = sums[r];
      }
      if (activation.activation == activation_quantize::Activation::none) continue;
      activation_quantize::Call part = activation;
      part.x = part.y = to;
      part.count = count * outputs;
      activate(part, 0, part.count);
    }
  });
}

}  // namespace

std::shared_ptr<void> prepare_linear(const Step& step, const Tensor* operands) {
  const Tensor& weight = operands[1];
  const float* bias = step.integers[0] ? operands[2].as<float>() : nullptr;
  if (weight.sizes[0] < 1 || weight.sizes[1] < 1)
    throw std::invalid_argument("linear: a weight without outputs or inputs");
  auto packed = std::make_shared<Packed>();
  packed->kernel = &grouped::select(grouped::Dtype::f32);
  const int64_t outputs = weight.sizes[0], inputs = weight.sizes[1];
  packed->memory.resize(grouped::panel_floats(*packed->kernel, 1, outputs, inputs));
  packed->panels = grouped::pack(*packed->kernel, weight.data, grouped::Dtype::f32, bias, 1,
                                 outputs, inputs, true, packed->memory.data());
  return packed;
}

std::shared_ptr<void> prepare_linear_bf16(const Step& step, const Tensor* operands) {
  const Tensor& weight = operands[1];
  const grouped::Kernel& kernel = grouped::select(grouped::Dtype::bf16);
  const int64_t count = weight.count();
  const float* const values = weight.as<float>();
  const bool exact = std::all_of(values, values + count, [](float value) {
    return (std::bit_cast<uint32_t>(value) & 0xffff) == 0;
  });
  if (kernel.unit_inputs == 1 || !exact) return prepare_linear(step, operands);
  if (weight.sizes[0] < 1 || weight.sizes[1] < 1)
    throw std::invalid_argument("linear_bf16: a weight without outputs or inputs");
  auto packed = std::make_shared<Packed>();
  packed->kernel = &kernel;
  std::vector<uint16_t> halves(count);
  std::transform(values, values + count, halves.begin(), to_bf16);
  const int64_t outputs = weight.sizes[0], inputs = weight.sizes[1];
  packed->memory.resize(grouped::panel_floats(kernel, 1, outputs, inputs));
  packed->panels = grouped::pack(kernel, halves.data(), grouped::Dtype::bf16, nullptr, 1, outputs,
                                 inputs, true, packed->memory.data());
  // The bias may be no bf16: it begins the fp32 sums as it is.
  float* const start = packed->memory.data() + (packed->panels.start - packed->panels.values);
  if (step.integers[0]) std::copy_n(operands[2].as<float>(), outputs, start);
  return packed;
}

Status run_linear(const Step& step, const Tensor* operands) {
  const Packed& packed = *static_cast<const Packed*>(step.prepared.get());
  const grouped::Kernel& kernel = *packed.kernel;
  const Tensor &x = operands[0], &weight = operands[1], &y = operands[step.operands.size() - 1];
  const int64_t outputs = weight.sizes[0], inputs = weight.sizes[1];
  const int64_t rows = x.count() / inputs;
  activation_quantize::Call activation{};
  activation.activation = static_cast<activation_quantize::Activation>(step.integers[1]);
  activation.x_type = activation_quantize::Input::f32;
  activation.y_type = activation_quantize::Output::f32;
  if (kernel.dots && outputs <= kFewOutputs) {
    const float* const bias = step.integers[0] ? operands[2].as<float>() : nullptr;
    run_few_outputs(x, weight, bias, y, kernel, activation);
    return {};
  }
  const int64_t tiles = (rows + grouped::kTileRows - 1) / grouped::kTileRows;
  const int64_t line_inputs = grouped::kLine * kernel.unit_inputs;
  const int64_t row_lines = (inputs + line_inputs - 1) / line_inputs;
  Line* const memory = scratch<Line>(rows * row_lines);
  const auto row0 = [&](int64_t tile) { return grouped::tile_row0(tile, rows, tiles); };
  const auto height = [&](int64_t tile) { return static_cast<int>(row0(tile + 1) - row0(tile)); };

  const bool pack_alone = rows * inputs < kParallelPackFloats;
  parallel_for(tiles, 1, pack_alone ? 1 : num_threads(), [&](int64_t begin, int64_t end) {
    for (int64_t t = begin; t < end; ++t)
      kernel.load(x.as<float>() + row0(t) * inputs, grouped::Dtype::f32, inputs, 1, inputs,
                  height(t), memory[row0(t) * row_lines].units, grouped::kLine,
                  height(t) * grouped::kLine);
  });

  const auto activate = activation_quantize::select().elements;

  const grouped::Matrix out{y.data, grouped::Dtype::f32, outputs, {0, 1}};
  const int threads = rows * outputs * inputs < kParallelMultiplyAdds ? 1 : num_threads();
  // Panel-major, as sparse_int8_linear: a thread reads its weights once from memory, then from its
  // caches, and shares no line of the output but at its border.
  const int64_t blocks = packed.panels.count * tiles;
  const int64_t grain = std::max<int64_t>(1, blocks / (threads * kChunksPerThread));
  parallel_for(blocks, grain, threads, [&](int64_t begin, int64_t end) {
    for (int64_t b = begin; b < end; ++b) {
      const int64_t t = b % tiles;
      grouped::multiply_tile(kernel, memory[row0(t) * row_lines].units, height(t), packed.panels, 0,
                             b / tiles, out, row0(t));
      if (activation.activation == activation_quantize::Activation::none) continue;
      const int64_t column0 = b / tiles * grouped::kPanelColumns;
      activation_quantize::Call part = activation;
      part.count = std::min<int64_t>(grouped::kPanelColumns, outputs - column0);
      for (int64_t r = row0(t); r < row0(t + 1); ++r) {
        part.x = part.y = y.as<float>() + r * outputs + column0;
        activate(part, 0, part.count);
      }
    }
  });
  return {};
}

}  // namespace fastrec::engine
