// window_linear: y = x W^T + b in fp32, where a row of x is a window: T parts of C floats that lie
// apart, and whose rows may overlap. A convolution reads its windows so, without a copy of them.
//
// x [B, P, T, C] f32, C contiguous and a multiple of 16; weight [N, T * C] f32, a constant; bias
// [N] f32; y f32 [B, P, N] contiguous.
#include <algorithm>

#include "engine/check.h"
#include "engine/steps/packed_linear.h"
#include "parallel.h"
#include "scratch.h"

namespace fastrec::engine {
namespace {

namespace grouped = grouped_linear;

struct alignas(64) Part {
  float units[grouped::kLine];
};

struct WindowLinear : PackedLinear {
  static constexpr const char* name = "window_linear";
  static constexpr OperandRule operands[] = {{.name = "x", .strided = true},
                                             {.name = "weight"},
                                             {.name = "bias", .optional = true},
                                             {.name = "y", .output = true}};
  static constexpr Traits traits = {
      .op = "grouped_linear", .shown = "window_linear", .users = Users::apart_of_two};

  static Rows rows(const Fields&) { return Rows::mixed; }
  static Isa isa(const Fields&, Tensors) { return grouped::select(grouped::Dtype::f32).isa; }

  static void check(const StepCheck& check, const Fields&) {
    const Shape &in = check.sizes(x), &of = check.sizes(weight);
    require(in.size() == 4 && of.size() == 2, "windows of parts, and a matrix");
    require(check.is(x, {Dtype::f32}), "windows of float32");
    check.unit(x, 3, "contiguous parts");
    require(in[2].is_number() && in[3].is_number() && in[2].coefficient > 0 &&
                in[3].coefficient > 0 && in[3].coefficient % grouped::kLine == 0,
            "parts of a multiple of 16");
    const int64_t outputs = of[0].coefficient;
    require(outputs > 0, "outputs");
    check.table(weight, Dtype::f32, {outputs, times(in[2], in[3].coefficient).coefficient});
    if (check.has(bias)) check.table(bias, Dtype::f32, {outputs});
    check.dense(y, {Dtype::f32});
    require(check.sizes(y) == (Shape{in[0], in[1], Extent(outputs)}), "a result for each window");
  }

  static std::shared_ptr<void> prepare(const Fields&, Tensors operands) {
    return packed_weight(operands[weight], operands[bias]);
  }

  static Status run(const Fields& fields, Tensors operands, const void* prepared) {
    const PackedWeight& packed = *static_cast<const PackedWeight*>(prepared);
    const Tensor& in = operands[x];
    const int64_t rows = in.sizes[0] * in.sizes[1], inputs = in.sizes[2] * in.sizes[3];
    const int64_t work = rows * inputs * operands[weight].sizes[0];
    constexpr int64_t kParallelMultiplyAdds = 500'000;
    const int threads = work < kParallelMultiplyAdds ? 1 : num_threads();
    const int64_t tiles = (rows + grouped::kTileRows - 1) / grouped::kTileRows;
    parallel_for(tiles, 1, threads, [&](int64_t begin, int64_t end) {
      Part* const memory = scratch<Part>(grouped::kTileRows * inputs / grouped::kLine);
      for (int64_t t = begin; t < end; ++t)
        run_tile(fields, operands, packed, grouped::tile_row0(t, rows, tiles),
                 grouped::tile_row0(t + 1, rows, tiles), memory->units);
    });
    return {};
  }

 private:
  static void run_tile(const Fields& fields, Tensors operands, const PackedWeight& packed,
                       int64_t first, int64_t last, float* tile) {
    const grouped::Kernel& kernel = *packed.kernel;
    const Tensor &in = operands[x], &to = operands[y];
    const int64_t windows = in.sizes[1], parts = in.sizes[2], width = in.sizes[3];
    const int height = static_cast<int>(last - first);
    // Windows of one user at a time: they lie equally far apart.
    for (int64_t r = first; r < last;) {
      const int64_t user = r / windows, at = r % windows;
      const int count = static_cast<int>(std::min(windows - at, last - r));
      const float* const from = in.as<float>() + user * in.strides[0] + at * in.strides[1];
      for (int64_t p = 0; p < parts; ++p)
        kernel.load(from + p * in.strides[2], grouped::Dtype::f32, in.strides[1], 1, width, count,
                    tile + p * width * height + (r - first) * grouped::kLine, grouped::kLine,
                    height * grouped::kLine);
      r += count;
    }
    const int64_t outputs = operands[weight].sizes[0];
    const grouped::Matrix out{to.data, grouped::Dtype::f32, outputs, {0, 1}};
    for (int64_t panel = 0; panel < packed.panels.count; ++panel)
      grouped::multiply_tile(kernel, tile, height, packed.panels, 0, panel, out, first);
    activation_quantize::Call call{};
    call.activation = fields.activation;
    if (call.activation == activation_quantize::Activation::none) return;
    call.x_type = activation_quantize::Input::f32;
    call.y_type = activation_quantize::Output::f32;
    call.x = call.y = to.as<float>() + first * outputs;
    call.count = height * outputs;
    activation_quantize::select().elements(call, 0, call.count);
  }
};

}  // namespace

Kind window_linear_kind() { return make_kind<WindowLinear>(); }

}  // namespace fastrec::engine
