// layer_norm: layer_norm_quantize.
//
// operands  x [.., D] f32; residual [.., D] f32 if integers[0]; weight, bias [D] f32; x + residual
//           f32 if there is an operand for it; result f32 or u8. All contiguous
//           but a u8 result in tiles
// integers  whether there is a residual, zero point of a u8 result, whether it is in the tiles of
//           the linear_int8 steps that read it (there: their size)
// numbers   eps, scale of a u8 result
#include <atomic>

#include "engine/steps.h"
#include "layer_norm_quantize/layer_norm_quantize.h"
#include "parallel.h"
#include "scratch.h"
#include "sparse_int8_linear/sparse_int8_linear.h"

namespace fastrec::engine {
namespace {

struct alignas(64) Line {
  uint8_t values[64];
};

// Below this many values (some 3 us) a second thread costs more than it brings.
constexpr int64_t kParallelValues = 8 * 1024;

// A tile's rows are normalised and, while they are in the first-level cache, laid out.
bool run_in_tiles(const layer_norm_quantize::Call& whole) {
  namespace linear = sparse_int8_linear;
  const int64_t dims = whole.dims;
  const linear::Kernel& kernel = linear::select();
  const linear::Tiling tiling(whole.rows, kernel.max_rows);
  const auto normalise = layer_norm_quantize::select().rows;
  std::atomic<bool> numbers{true};
  const int threads = whole.rows * dims < kParallelValues ? 1 : num_threads();
  parallel_for(tiling.count, 1, threads, [&](int64_t begin, int64_t end) {
    Line* const rows = scratch<Line>((kernel.max_rows * dims + 63) / 64);
    linear::Call tile{};
    tile.weight.inputs = dims;
    tile.x = rows;
    tile.x_dtype = linear::Dtype::u8;
    tile.x_quantisation = {1.0f, 0};
    for (int64_t t = begin; t < end; ++t) {
      const int64_t row0 = tiling.row0(t);
      layer_norm_quantize::Call part = whole;
      part.x += row0 * dims;
      if (part.residual) part.residual += row0 * dims;
      if (part.sum) part.sum += row0 * dims;
      part.y = rows;
      if (!normalise(part, 0, tiling.height(t))) numbers.store(false, std::memory_order_relaxed);
      kernel.pack_tile(tile, 0, tiling.height(t),
                       static_cast<uint8_t*>(whole.y) +
                           row0 * linear::tile_row_elements(dims) * kernel.element_bytes);
    }
  });
  return numbers.load(std::memory_order_relaxed);
}

}  // namespace

Status run_layer_norm(const Step& step, const Tensor* operands) {
  const int residual = step.integers[0] != 0;
  const int inputs = 3 + residual, last = static_cast<int>(step.operands.size()) - 1;
  const Tensor &x = operands[0], &y = operands[last];
  layer_norm_quantize::Call call{};
  call.x = x.as<float>();
  call.residual = residual ? operands[1].as<float>() : nullptr;
  call.weight = operands[1 + residual].as<float>();
  call.bias = operands[2 + residual].as<float>();
  call.sum = last > inputs ? operands[inputs].as<float>() : nullptr;
  call.y = y.data;
  call.y_u8 = y.dtype == Dtype::u8;
  call.quantisation = {static_cast<float>(step.numbers[1]), static_cast<int32_t>(step.integers[1])};
  call.eps = static_cast<float>(step.numbers[0]);
  call.dims = x.sizes[x.dims - 1];
  if (call.dims == 0) return {};
  call.rows = x.count() / call.dims;
  const bool numbers = step.integers[2] ? run_in_tiles(call) : layer_norm_quantize::run(call);
  return numbers ? Status{} : Status{Fault::not_a_number};
}

}  // namespace fastrec::engine
