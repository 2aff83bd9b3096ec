// layer_norm: layer_norm_quantize.
//
// x [.., D] f32; residual [.., D] f32; weight and bias [D] f32, constants; sum, x + residual f32,
// where there is an operand for it; y f32 or u8. All contiguous, but a u8 y may be in the tiles of
// the linear_int8 steps that read it (there: their size).
#include <atomic>

#include "engine/check.h"
#include "engine/make_kind.h"
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

struct LayerNorm {
  static constexpr const char* name = "layer_norm";
  enum { x, residual, weight, bias, sum, y };
  static constexpr OperandRule operands[] = {{.name = "x"},
                                             {.name = "residual", .optional = true},
                                             {.name = "weight"},
                                             {.name = "bias"},
                                             {.name = "sum", .optional = true, .output = true},
                                             {.name = "y", .output = true}};
  struct Fields {
    double eps = 1e-5;
    double y_scale = 1;  // of a u8 result
    int64_t y_zero_point = 0;
    bool y_tiles = false;

    template <class V>
    void each(V& visit) {
      visit("eps", eps);
      visit("y_scale", y_scale);
      visit("y_zero_point", y_zero_point);
      visit("y_tiles", y_tiles);
    }
  };
  static constexpr Traits traits = {
      .op = "layer_norm_quantize", .shown = "layer_norm", .users = Users::apart_of_two};

  static Rows rows(const Fields&) { return Rows::last; }
  static Isa isa(const Fields&, Tensors) { return layer_norm_quantize::select().isa; }
  static uint32_t tiled(const Fields& fields) { return fields.y_tiles ? 1u << y : 0; }

  static void check(const StepCheck& check, const Fields& fields) {
    require_byte(fields.y_zero_point);
    require_scale(fields.y_scale);
    const Matrix matrix = check.rows(x);
    for (const int whole : {x, residual, sum})
      if (check.has(whole)) {
        check.dense(whole, {Dtype::f32});
        check.elements(whole, times(matrix.rows, matrix.width), "operands of one size");
      }
    for (const int affine : {weight, bias}) check.table(affine, Dtype::f32, {matrix.width});
    check.result(y, matrix, fields.y_tiles);
  }

  static Status run(const Fields& fields, Tensors operands, const void*) {
    const Tensor& in = operands[x];
    layer_norm_quantize::Call call{};
    call.x = in.as<float>();
    call.residual = operands[residual].as<float>();
    call.weight = operands[weight].as<float>();
    call.bias = operands[bias].as<float>();
    call.sum = operands[sum].as<float>();
    call.y = operands[y].data;
    call.y_u8 = operands[y].dtype == Dtype::u8;
    call.quantisation = {static_cast<float>(fields.y_scale),
                         static_cast<int32_t>(fields.y_zero_point)};
    call.eps = static_cast<float>(fields.eps);
    call.dims = in.sizes[in.dims - 1];
    if (call.dims == 0) return {};
    call.rows = in.count() / call.dims;
    const bool numbers = fields.y_tiles ? run_in_tiles(call) : layer_norm_quantize::run(call);
    return numbers ? Status{} : Status{Fault::not_a_number};
  }

  static void cost(const Fields&, Tensors, Cost& cost) { cost.peak = ""; }
};

}  // namespace

Kind layer_norm_kind() { return make_kind<LayerNorm>(); }

}  // namespace fastrec::engine
