// Sizes that depend on a few symbols: the batch B, the history length L, the candidates m.
//
// A size or stride is a product: coefficient * symbol_0^e0 * symbol_1^e1 ... Reshapes of contiguous
// tensors need no more, and it is resolved for a call in a few nanoseconds.
#pragma once

#include <array>
#include <cstdint>
#include <optional>
#include <vector>

namespace fastrec::engine {

inline constexpr int kMaxSymbols = 4;
inline constexpr int kMaxDims = 6;
inline constexpr int kMaxOperands = 32;

// The sizes of a call, by symbol.
using Symbols = std::array<int64_t, kMaxSymbols>;

struct Extent {
  int64_t coefficient = 0;
  std::array<uint8_t, kMaxSymbols> exponent{};

  Extent() = default;
  Extent(int64_t number) : coefficient(number) {}
  static Extent of_symbol(int symbol) {
    Extent e(1);
    e.exponent[symbol] = 1;
    return e;
  }

  // Without a sign, because it may wrap: strides of dimensions that have one element or none.
  int64_t at(const Symbols& symbols) const {
    auto value = static_cast<uint64_t>(coefficient);
    for (int s = 0; s < kMaxSymbols; ++s)
      for (int e = 0; e < exponent[s]; ++e) value *= static_cast<uint64_t>(symbols[s]);
    return static_cast<int64_t>(value);
  }

  // The same where 64 bits may not hold it.
  double roughly(const Symbols& symbols) const {
    double value = static_cast<double>(coefficient);
    for (int s = 0; s < kMaxSymbols; ++s)
      for (int e = 0; e < exponent[s]; ++e) value *= static_cast<double>(symbols[s]);
    return value;
  }

  bool depends_on(int symbol) const { return exponent[symbol] != 0; }
  bool is_number() const { return exponent == std::array<uint8_t, kMaxSymbols>{}; }
  std::optional<int64_t> number() const {
    return is_number() ? std::optional(coefficient) : std::nullopt;
  }
  // The same without one symbol.
  Extent without(int symbol) const {
    Extent e = *this;
    e.exponent[symbol] = 0;
    return e;
  }

  bool operator==(const Extent&) const = default;
  // Coefficients and exponents of a checked program are small enough (check.cpp).
  friend Extent operator*(const Extent& a, const Extent& b) {
    Extent e(a.coefficient * b.coefficient);
    if (e.coefficient != 0)
      for (int s = 0; s < kMaxSymbols; ++s)
        e.exponent[s] = static_cast<uint8_t>(a.exponent[s] + b.exponent[s]);
    return e;
  }
};

using Shape = std::vector<Extent>;

// The product of a shape's sizes from dimension `first` up to, without, `end`.
inline Extent product(const Shape& shape, size_t first, size_t end) {
  Extent e(1);
  for (size_t d = first; d < end; ++d) e = e * shape[d];
  return e;
}
inline Extent product(const Shape& shape) { return product(shape, 0, shape.size()); }

// Row-major strides in elements.
inline Shape contiguous_strides(const Shape& shape) {
  Shape strides(shape.size());
  Extent stride(1);
  for (size_t d = shape.size(); d-- > 0;) {
    strides[d] = stride;
    stride = stride * shape[d];
  }
  return strides;
}

}  // namespace fastrec::engine
