// linear: y = x W^T + b in fp32 (packed_linear.h says of what operands).
#include "engine/steps/packed_linear.h"

namespace fastrec::engine {
namespace {

struct Linear : PackedLinear {
  static constexpr const char* name = "linear";
  static constexpr Traits traits = {
      .op = "grouped_linear", .shown = "linear", .users = Users::apart_of_two};

  static Isa isa(const Fields&, Tensors) {
    return grouped_linear::select(grouped_linear::Dtype::f32).isa;
  }
};

}  // namespace

Kind linear_kind() { return make_kind<Linear>(); }

}  // namespace fastrec::engine
