// linear_bf16: linear for a weight that bfloat16 holds exactly. Where the CPU multiplies bf16, x is
// rounded to it too; sums stay fp32. Elsewhere it is linear.
#include <algorithm>
#include <bit>

#include "element.h"
#include "engine/steps/packed_linear.h"

namespace fastrec::engine {
namespace {

namespace grouped = grouped_linear;

struct LinearBf16 : PackedLinear {
  static constexpr const char* name = "linear_bf16";
  static constexpr Traits traits = {
      .op = "grouped_linear", .shown = "linear_bf16", .users = Users::apart_of_two};

  static Isa isa(const Fields&, Tensors) { return grouped::select(grouped::Dtype::bf16).isa; }

  static std::shared_ptr<void> prepare(const Fields& fields, Tensors operands) {
    const Tensor& from = operands[weight];
    const grouped::Kernel& kernel = grouped::select(grouped::Dtype::bf16);
    const int64_t count = from.count();
    const float* const values = from.as<float>();
    const bool exact = std::all_of(values, values + count, [](float value) {
      return (std::bit_cast<uint32_t>(value) & 0xffff) == 0;
    });
    if (kernel.unit_inputs == 1 || !exact) return PackedLinear::prepare(fields, operands);
    auto packed = std::make_shared<PackedWeight>();
    packed->kernel = &kernel;
    std::vector<uint16_t> halves(count);
    std::transform(values, values + count, halves.begin(), to_bf16);
    const int64_t outputs = from.sizes[0], inputs = from.sizes[1];
    packed->memory.resize(grouped::panel_floats(kernel, 1, outputs, inputs));
    packed->panels = grouped::pack(kernel, halves.data(), grouped::Dtype::bf16, nullptr, 1, outputs,
                                   inputs, true, packed->memory.data());
    // The bias may be no bf16: it begins the fp32 sums as it is.
    float* const start = packed->memory.data() + (packed->panels.start - packed->panels.values);
    if (operands[bias].data) std::copy_n(operands[bias].as<float>(), outputs, start);
    return packed;
  }

  static void cost(const Fields& fields, Tensors operands, Cost& cost) {
    PackedLinear::cost(fields, operands, cost);
    if (isa(fields, operands) == Isa::avx512bf16) cost.peak = "bf16";
  }
};

}  // namespace

Kind linear_bf16_kind() { return make_kind<LinearBf16>(); }

}  // namespace fastrec::engine
