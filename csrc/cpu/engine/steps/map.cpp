// map: an elementwise program over broadcast operands, interpreted a block at a time, so that a
// chain of any length reads and writes memory once.
//
// x: the inputs, expanded to the result's dims (stride 0 where they are broadcast); y f32, i64 or
// bool.
#include <algorithm>
#include <utility>

#include "engine/check.h"
#include "engine/loops/loops.h"
#include "engine/make_kind.h"
#include "engine/map_program.h"
#include "parallel_all.h"

namespace fastrec::engine {
namespace {

// Elements times registers, some 3 us: below, a second thread costs more than it brings.
constexpr int64_t kParallelWork = 80'000;
constexpr int64_t kChunksPerThread = 4;

// Operands with as few dims as their strides allow, but at least two.
loops::MapCall collapse(const Tensor* operands, int inputs, bool keep_dims) {
  const Tensor& result = operands[inputs];
  loops::MapCall call{};
  call.operands = operands;
  call.inputs = inputs;
  const auto append = [&](int64_t size) {
    call.sizes[call.dims] = size;
    for (int o = 0; o <= inputs; ++o) call.strides[o][call.dims] = 0;
    ++call.dims;
  };
  if (result.dims < 2) append(1);
  const int first = call.dims;
  for (int d = 0; d < result.dims; ++d) {
    bool merges = !keep_dims && call.dims > first;
    for (int o = 0; merges && o <= inputs; ++o)
      merges = call.strides[o][call.dims - 1] == operands[o].strides[d] * result.sizes[d];
    if (!merges) append(1);
    call.sizes[call.dims - 1] *= result.sizes[d];
    for (int o = 0; o <= inputs; ++o) call.strides[o][call.dims - 1] = operands[o].strides[d];
  }
  if (call.dims < 2) {  // all in one
    append(call.sizes[0]);
    for (int o = 0; o <= inputs; ++o) std::swap(call.strides[o][0], call.strides[o][1]);
    call.sizes[0] = 1;
  }
  const int last = call.dims - 1;
  call.block_width = std::min<int64_t>(call.sizes[last], loops::kBlock);
  call.block_rows = 1;
  if (call.sizes[last] > 0 && call.sizes[last] < loops::kBlock)
    call.block_rows = std::min(call.sizes[last - 1], loops::kBlock / call.sizes[last]);
  return call;
}

Status run_program(const std::vector<MapInstruction>& program, Tensors operands) {
  const int inputs = static_cast<int>(operands.size()) - 1;
  const int64_t elements = operands[inputs].count();
  if (elements == 0) return {};
  const bool has_index = std::any_of(program.begin(), program.end(),
                                     [](const MapInstruction& i) { return i.op == MapOp::index; });
  loops::MapCall call = collapse(operands.data(), inputs, has_index);
  call.program = &program;
  int64_t blocks = 1;
  for (int d = 0; d < call.dims; ++d) blocks *= call.blocks_along(d);
  const int64_t work = elements * (inputs + static_cast<int64_t>(program.size()) + 1);
  const int threads = work < kParallelWork ? 1 : num_threads();
  const int64_t grain = std::max<int64_t>(1, blocks / (threads * kChunksPerThread));
  const auto map = loops::select().map;
  const auto part = [&](int64_t begin, int64_t end) { return map(call, begin, end); };
  return parallel_all(blocks, grain, threads, part) ? Status{} : Status{Fault::division_by_zero};
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
