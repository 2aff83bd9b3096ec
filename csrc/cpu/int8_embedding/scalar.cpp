#include "int8_embedding/int8_embedding.h"

namespace fastrec::int8_embedding {
namespace {

void gather(const Call& call, int64_t begin, int64_t end) {
  for (int64_t i = begin; i < end; ++i) {
    const int8_t* row = call.table + call.ids[i] * call.dims;
    const float scale = call.scale[call.ids[i]];
    for (int64_t d = 0; d < call.dims; ++d)
      call.out[i * call.dims + d] = static_cast<float>(row[d]) * scale;
  }
}

}  // namespace

const Kernel kScalar = {Isa::scalar, gather};

}  // namespace fastrec::int8_embedding
