#include "engine/cost.h"

#include <map>
#include <set>
#include <tuple>

namespace fastrec::engine {
namespace {

Tensor resolve(const Program& program, const View& view, const Symbols& symbols,
               const std::byte* const* inputs) {
  Tensor tensor{};
  if (view.absent()) return tensor;
  const Buffer& buffer = program.buffers[view.buffer];
  const std::byte* data = nullptr;
  if (buffer.space == Space::constant) data = program.constants[buffer.index].data;
  if (buffer.space == Space::input && inputs) data = inputs[buffer.index];
  if (data) tensor.data = const_cast<std::byte*>(data) + view.offset * bytes_of(buffer.dtype);
  tensor.dtype = buffer.dtype;
  tensor.dims = static_cast<int>(view.sizes.size());
  for (int d = 0; d < tensor.dims; ++d) {
    tensor.sizes[d] = view.sizes[d].at(symbols);
    tensor.strides[d] = view.strides[d].at(symbols);
  }
  return tensor;
}

// Bytes of distinct elements: what is broadcast, or read under two shapes, counts once.
class Traffic {
 public:
  void add(const View& view, const Tensor& tensor) {
    int64_t bytes = bytes_of(tensor.dtype);
    for (int d = 0; d < tensor.dims; ++d)
      if (view.strides[d] != Extent(0)) bytes *= tensor.sizes[d];
    if (seen_.emplace(view.buffer, view.offset, bytes).second) total += bytes;
  }

  int64_t total = 0;

 private:
  std::set<std::tuple<int, int64_t, int64_t>> seen_;
};

}  // namespace

StepCost cost_of(const Program& program, const ProgramStep& step, const Symbols& symbols,
                 const std::byte* const* inputs) {
  std::vector<Tensor> tensors;
  Traffic constants, activations, written;
  std::map<int, int64_t> whole;  // bytes of the constants
  for (size_t o = 0; o < step.operands.size(); ++o) {
    const View& view = step.operands[o];
    tensors.push_back(resolve(program, view, symbols, inputs));
    if (view.absent()) continue;
    const Buffer& buffer = program.buffers[view.buffer];
    const bool constant = buffer.space == Space::constant;
    (step.writes(o) ? written : constant ? constants : activations).add(view, tensors.back());
    if (constant) whole[view.buffer] = program.constants[buffer.index].bytes;
  }
  const Kind& kind = *step.kind;
  const void* const fields = step.fields.get();
  StepCost result{{}, 0, kind.shown(fields, tensors), nullptr};
  result.cost.constant_bytes = constants.total;
  result.cost.activation_bytes = activations.total;
  result.cost.written_bytes = written.total;
  kind.cost(fields, tensors, result.cost);
  for (const auto& [buffer, bytes] : whole) result.bytes += bytes;
  if (kind.isa) result.isa = kind.isa(fields, tensors);
  return result;
}

}  // namespace fastrec::engine
