// Plans written by hand, for the executor's tests.
#pragma once

#include <cstring>
#include <vector>

#include "check.h"
#include "engine/map_ops.h"
#include "engine/plan.h"

namespace fastrec::tests {

using namespace engine;

inline constexpr int kBatch = 0, kLength = 1;  // the symbols

// coefficient * B^batches * L^lengths
inline Extent extent(int64_t coefficient, uint8_t batches = 0, uint8_t lengths = 0) {
  Extent e;
  e.coefficient = coefficient;
  e.exponent[kBatch] = batches;
  e.exponent[kLength] = lengths;
  return e;
}
inline const Extent B = extent(1, 1), L = extent(1, 0, 1);

inline Operand dense(Space space, int index, Dtype dtype, const std::vector<Extent>& sizes) {
  Operand operand{space, index, dtype, 0, sizes, sizes};
  Extent stride = extent(1);
  for (size_t d = sizes.size(); d-- > 0;) {
    operand.strides[d] = stride;
    stride.coefficient *= sizes[d].coefficient;
    for (int s = 0; s < kMaxSymbols; ++s) stride.exponent[s] += sizes[d].exponent[s];
  }
  return operand;
}

// What lies in memory already; dense without strides.
inline Tensor tensor(const void* data, Dtype dtype, const std::vector<int64_t>& sizes,
                     std::vector<int64_t> strides = {}) {
  Tensor t{};
  t.data = static_cast<std::byte*>(const_cast<void*>(data));
  t.dtype = dtype;
  t.dims = static_cast<int>(sizes.size());
  int64_t stride = 1;
  for (int d = t.dims; d-- > 0; stride *= sizes[d]) {
    t.sizes[d] = sizes[d];
    t.strides[d] = strides.empty() ? stride : strides[d];
  }
  return t;
}

inline Step make_step(const char* kind, const std::vector<Operand>& operands,
                      const std::vector<int64_t>& integers, const std::vector<double>& numbers) {
  return {kind, find_kind(kind)->run, operands, integers, numbers, nullptr};
}

inline int64_t op(const char* name) {
  for (int i = 0; i < kMapOps; ++i)
    if (!std::strcmp(kMapOpNames[i], name)) return i;
  CHECK(false);
  return -1;
}

}  // namespace fastrec::tests
