#include "engine/entrance.h"

namespace fastrec::engine {
namespace {

int64_t value_of(const Size& size, const Symbols& symbols, int64_t more = 0) {
  return size.symbol < 0 ? size.size : symbols[size.symbol] + more;
}

// An id below 0 is huge without its sign. All are looked at: a loop without an exit is faster.
template <class Id, class Unsigned>
bool all_below(const std::byte* data, int64_t count, int64_t top) {
  const Id* ids = reinterpret_cast<const Id*>(data);
  bool below = true;
  for (int64_t i = 0; i < count; ++i) below &= static_cast<Unsigned>(ids[i]) < uint64_t(top);
  return below;
}

int64_t count_of(const Array& array) {
  int64_t count = 1;
  for (int d = 0; d < array.dims; ++d) count *= array.sizes[d];
  return count;
}

bool all_numbers(const Array& array) {
  const float* values = reinterpret_cast<const float*>(array.data);
  const int64_t count = count_of(array);
  bool numbers = true;
  for (int64_t i = 0; i < count; ++i) numbers &= values[i] == values[i];
  return numbers;
}

bool in_range(const Array& array, int64_t top) {
  const int64_t count = count_of(array);
  if (array.dtype == Dtype::i64) return all_below<int64_t, uint64_t>(array.data, count, top);
  if (array.dtype == Dtype::i32) return all_below<int32_t, uint32_t>(array.data, count, top);
  return false;
}

}  // namespace

bool Entrance::fits(const Input& input, const Array& array, Symbols& symbols) const {
  if (array.dtype != input.dtype || array.dims != static_cast<int>(input.dims.size())) return false;
  for (int d = 0; d < array.dims; ++d) {
    const Size& expected = input.dims[d];
    const int64_t size = array.sizes[d];
    if (expected.symbol >= 0 && symbols[expected.symbol] < 0) {
      const Range& limit = limits_[expected.symbol];
      if (size < limit.low || size > limit.high) return false;
      symbols[expected.symbol] = size;
    }
    if (value_of(expected, symbols) != size) return false;
  }
  return true;
}

bool Entrance::admits(const Array* arrays, Symbols& symbols) const {
  Symbols found;
  found.fill(-1);
  for (size_t i = 0; i < inputs_.size(); ++i)
    if (!fits(inputs_[i], arrays[i], found)) return false;
  for (size_t i = 0; i < inputs_.size(); ++i) {
    const Input& input = inputs_[i];
    if (input.dtype == Dtype::f32 && !all_numbers(arrays[i])) return false;
    if (input.checked && !in_range(arrays[i], value_of(input.top, found, 1))) return false;
  }
  symbols = found;
  return true;
}

}  // namespace fastrec::engine
