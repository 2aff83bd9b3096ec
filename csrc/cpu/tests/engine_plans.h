// Plans written by hand, for the executor's tests.
#pragma once

#include <string>
#include <vector>

#include "check.h"
#include "engine/plan.h"

namespace fastrec::tests {

using namespace engine;

inline constexpr int kBatch = 0, kLength = 1;  // the symbols

// coefficient * B^batches * L^lengths
inline Extent extent(int64_t coefficient, uint8_t batches = 0, uint8_t lengths = 0) {
  Extent e(coefficient);
  e.exponent[kBatch] = batches;
  e.exponent[kLength] = lengths;
  return e;
}
inline const Extent B = extent(1, 1), L = extent(1, 0, 1);

inline Operand dense(Space space, int index, Dtype dtype, const Shape& sizes) {
  return {space, index, dtype, 0, sizes, contiguous_strides(sizes)};
}

// Tensors that lie in memory already; dense without strides.
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
                      json::Object fields = {}) {
  const Kind* const known = find_kind(kind);
  CHECK(known && (known->operands[0].many || operands.size() == known->operands.size()));
  return {known, known->read(std::move(fields)), operands, nullptr};
}

// A step by itself, on memory.
inline Status run_step(const char* kind, const std::vector<Tensor>& operands,
                       json::Object fields = {}) {
  const Kind* const known = find_kind(kind);
  CHECK(known && (known->operands[0].many || operands.size() == known->operands.size()));
  const auto made = known->read(std::move(fields));
  std::shared_ptr<void> prepared;
  if (known->prepare) prepared = known->prepare(made.get(), operands);
  return known->run(made.get(), operands, prepared.get());
}
inline const Tensor kAbsent{};  // an optional operand that is not there

}  // namespace fastrec::tests
