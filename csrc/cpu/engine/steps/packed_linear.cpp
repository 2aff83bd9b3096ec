#include "engine/steps/packed_linear.h"

#include <algorithm>
#include <memory>

#include "engine/check.h"
#include "parallel.h"
#include "scratch.h"

namespace fastrec::engine {
namespace grouped = grouped_linear;
namespace {

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

void PackedLinear::check(const StepCheck& check, const Fields&) {
  const Matrix in = check.rows(x);
  check.dense(x, {Dtype::f32});
  require(check.sizes(weight).size() == 2, "a weight of two dimensions");
  const int64_t outputs = check.sizes(weight)[0].coefficient;
  require(outputs > 0, "outputs");
  check.table(weight, Dtype::f32, {outputs, in.width});
  if (check.has(bias)) check.table(bias, Dtype::f32, {outputs});
  check.dense(y, {Dtype::f32});
  check.result(y, {in.rows, outputs}, false);
}

std::shared_ptr<PackedWeight> packed_weight(const Tensor& weight, const Tensor& bias) {
  auto packed = std::make_shared<PackedWeight>();
  packed->kernel = &grouped::select(grouped::Dtype::f32);
  const int64_t outputs = weight.sizes[0], inputs = weight.sizes[1];
  packed->memory.resize(grouped::panel_floats(*packed->kernel, 1, outputs, inputs));
  packed->panels = grouped::pack(*packed->kernel, weight.data, grouped::Dtype::f32,
                                 bias.as<float>(), 1, outputs, inputs, true, packed->memory.data());
  return packed;
}

std::shared_ptr<void> PackedLinear::prepare(const Fields&, Tensors operands) {
  const grouped::Kernel& kernel = grouped::select(grouped::Dtype::f32);
  if (kernel.dots && operands[weight].sizes[0] <= kFewOutputs) {
    auto as_it_lies = std::make_shared<PackedWeight>();
    as_it_lies->kernel = &kernel;
    return as_it_lies;
  }
  return packed_weight(operands[weight], operands[bias]);
}

Status PackedLinear::run(const Fields& fields, Tensors operands, const void* prepared) {
  const PackedWeight& packed = *static_cast<const PackedWeight*>(prepared);
  const grouped::Kernel& kernel = *packed.kernel;
  const Tensor &x = operands[PackedLinear::x], &weight = operands[PackedLinear::weight],
               &y = operands[PackedLinear::y];
  const int64_t outputs = weight.sizes[0], inputs = weight.sizes[1];
  const int64_t rows = x.count() / inputs;
  activation_quantize::Call activation{};
  activation.activation = fields.activation;
  activation.x_type = activation_quantize::Input::f32;
  activation.y_type = activation_quantize::Output::f32;
  if (kernel.dots && outputs <= kFewOutputs) {
    run_few_outputs(x, weight, operands[bias].as<float>(), y, kernel, activation);
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

void PackedLinear::cost(const Fields&, Tensors operands, Cost& cost) {
  cost.macs = operands[y].count() * operands[weight].sizes[1];
  cost.peak = "fp32";
  cost.density = 1.0;
}

}  // namespace fastrec::engine
