// The inputs of a call: names, dtypes, dimensions, ranges of ids.
#pragma once

#include <array>
#include <cstdint>
#include <optional>
#include <string>
#include <vector>

#include "engine/check.h"

namespace fastrec::engine {

// Symbols of a specification: the program's first, then those that no step depends on.
inline constexpr int kMaxSpecSymbols = 8;
using SpecSizes = std::array<int64_t, kMaxSpecSymbols>;  // -1: not known yet

// A size, or (symbol >= 0) that symbol's.
struct SpecSize {
  int64_t number = 0;
  int symbol = -1;
  bool operator==(const SpecSize&) const = default;
};

struct InputField {
  std::string name;
  Dtype dtype = Dtype::i64;
  std::vector<SpecSize> dims;
  // Ids lie below a number; values in 0..size of a symbol. None: any value, but no NaN.
  std::optional<SpecSize> rows;
};

// A contiguous array of a request.
struct Array {
  const std::byte* data = nullptr;
  Dtype dtype = Dtype::i64;
  int dims = 0;
  const int64_t* sizes = nullptr;

  int64_t count() const;
};

struct InputSpec {
  std::vector<std::string> symbols;
  std::vector<Limit> limits;  // one a symbol
  std::vector<InputField> fields;

  // {"fields": [{"name", "dims": [size or symbol], "dtype", "rows"}], "limits": {symbol: [low,
  // high]}}; `symbols` are the program's. Throws json::Error or InvalidProgram.
  static InputSpec read(const json::Value& value, const std::vector<std::string>& symbols);
  // The fields at these positions.
  InputSpec of(const std::vector<int>& positions) const;

  // Whether the arrays, one a field, are as the fields say; if so `sizes` holds the symbols' sizes.
  // Those known before are held to.
  bool admits(const Array* arrays, SpecSizes& sizes) const;
  // The reason why they are not admitted, in words; "" where they are.
  std::string refusal(const Array* arrays, SpecSizes sizes) const;

  int symbol(std::string_view name) const;  // -1: none of that name
};

inline constexpr SpecSizes unknown_sizes() {
  SpecSizes sizes{};
  sizes.fill(-1);
  return sizes;
}

}  // namespace fastrec::engine
