// An operand of one call: address, sizes and strides in elements.
#pragma once

#include <cstddef>
#include <cstdint>

#include "engine/extent.h"

namespace fastrec::engine {

enum class Dtype : int { f32, i64, u8, s8, b8, i32 };
inline constexpr const char* kDtypeNames[] = {"float32", "int64", "uint8", "int8", "bool", "int32"};
int64_t bytes_of(Dtype dtype);

struct Tensor {
  std::byte* data;  // null: an optional operand that is absent
  Dtype dtype;
  int dims;
  int64_t sizes[kMaxDims], strides[kMaxDims];

  template <class T>
  T* as() const {
    return reinterpret_cast<T*>(data);
  }
  int64_t count() const {
    int64_t n = 1;
    for (int d = 0; d < dims; ++d) n *= sizes[d];
    return n;
  }
};

}  // namespace fastrec::engine
