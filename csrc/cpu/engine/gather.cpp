// gather: rows of a table.
//
// operands  ids i64 (contiguous, count n), table [R, D] f32 or s8, scale [R] f32 (s8 tables only),
//           result f32 [n, D] contiguous
#include <cstring>

#include "engine/steps.h"
#include "int8_embedding/int8_embedding.h"

namespace fastrec::engine {

Status run_gather(const Step& step, const Tensor* operands) {
  const Tensor &ids = operands[0], &table = operands[1],
               &result = operands[step.operands.size() - 1];
  const int64_t count = ids.count(), rows = table.sizes[0], dims = table.sizes[1];
  const int64_t* id = ids.as<int64_t>();
  if (table.dtype == Dtype::s8) {
    const int64_t bad = int8_embedding::run(
        {id, table.as<int8_t>(), operands[2].as<float>(), result.as<float>(), count, rows, dims});
    return bad < 0 ? Status{} : Status{Fault::id_out_of_range, -1, id[bad]};
  }
  for (int64_t i = 0; i < count; ++i) {
    if (id[i] < 0 || id[i] >= rows) return {Fault::id_out_of_range, -1, id[i]};
    std::memcpy(result.as<float>() + i * dims, table.as<float>() + id[i] * dims,
                dims * sizeof(float));
  }
  return {};
}

}  // namespace fastrec::engine
