#include "engine/input_spec.h"

#include <algorithm>

namespace fastrec::engine {
namespace {

int64_t value_of(const SpecSize& size, const SpecSizes& sizes, int64_t more = 0) {
  return size.symbol < 0 ? size.number : sizes[size.symbol] + more;
}

// An id below 0 is huge without its sign. All are looked at: a loop without an exit is faster.
template <class Id, class Unsigned>
bool all_below(const std::byte* data, int64_t count, int64_t top) {
  const Id* ids = reinterpret_cast<const Id*>(data);
  bool below = true;
  for (int64_t i = 0; i < count; ++i)
    below &= static_cast<Unsigned>(ids[i]) < static_cast<uint64_t>(top);
  return below;
}

bool all_numbers(const Array& array) {
  const float* values = reinterpret_cast<const float*>(array.data);
  const int64_t count = array.count();
  bool numbers = true;
  for (int64_t i = 0; i < count; ++i) numbers &= values[i] == values[i];
  return numbers;
}

bool in_range(const Array& array, int64_t top) {
  const int64_t count = array.count();
  if (array.dtype == Dtype::i64) return all_below<int64_t, uint64_t>(array.data, count, top);
  if (array.dtype == Dtype::i32) return all_below<int32_t, uint32_t>(array.data, count, top);
  return false;
}

// Of a field whose array is given; sets the sizes that it brings.
bool fits(const InputField& field, const std::vector<Limit>& limits, const Array& array,
          SpecSizes& sizes) {
  if (array.dtype != field.dtype || array.dims != static_cast<int>(field.dims.size())) return false;
  for (int d = 0; d < array.dims; ++d) {
    const SpecSize& expected = field.dims[d];
    const int64_t size = array.sizes[d];
    if (expected.symbol >= 0 && sizes[expected.symbol] < 0) {
      const Limit& limit = limits[expected.symbol];
      if (size < limit.low || (limit.high >= 0 && size > limit.high)) return false;
      sizes[expected.symbol] = size;
    }
    if (value_of(expected, sizes) != size) return false;
  }
  return true;
}

// Whether values are numbers, and ids inside their range.
bool sound(const InputField& field, const Array& array, const SpecSizes& sizes) {
  if (field.dtype == Dtype::f32 && !all_numbers(array)) return false;
  return !field.rows || in_range(array, value_of(*field.rows, sizes, 1));
}

}  // namespace

int64_t Array::count() const {
  int64_t n = 1;
  for (int d = 0; d < dims; ++d) n *= sizes[d];
  return n;
}

InputSpec InputSpec::read(const json::Value& value, const std::vector<std::string>& symbols) {
  InputSpec spec;
  spec.symbols = symbols;
  const auto size = [&](const json::Value& from) -> SpecSize {
    if (!from.is_text()) return {from.integer(), -1};
    int found = spec.symbol(from.text());
    if (found < 0) {
      found = static_cast<int>(spec.symbols.size());
      if (found == kMaxSpecSymbols) throw InvalidProgram("inputs of too many symbols");
      spec.symbols.push_back(from.text());
    }
    return {0, found};
  };
  const json::List& fields = value.at("fields").list();
  if (fields.empty() || fields.size() > kMaxOperands)
    throw InvalidProgram("1 to " + std::to_string(kMaxOperands) + " inputs");
  for (const json::Value& row : fields) {
    InputField field;
    field.name = row.at("name").text();
    for (const InputField& other : spec.fields)
      if (other.name == field.name) throw InvalidProgram("two inputs of one name");
    const std::string& dtype = row.at("dtype").text();
    const auto known = std::find(std::begin(kDtypeNames), std::end(kDtypeNames), dtype);
    if (known == std::end(kDtypeNames)) throw InvalidProgram("an input of an unknown dtype");
    field.dtype = static_cast<Dtype>(known - std::begin(kDtypeNames));
    if (row.at("dims").list().size() > kMaxDims) throw InvalidProgram("too many dimensions");
    for (const json::Value& dim : row.at("dims").list()) {
      field.dims.push_back(size(dim));
      if (field.dims.back().symbol < 0 && field.dims.back().number < 1)
        throw InvalidProgram("sizes of at least 1");
    }
    const json::Value* rows = row.find("rows");
    if (rows && !rows->is_null()) {
      if (field.dtype != Dtype::i64 && field.dtype != Dtype::i32)
        throw InvalidProgram("a range of ids for an input of " + dtype);
      field.rows = size(*rows);
      if (field.rows->symbol < 0 && field.rows->number < 0)
        throw InvalidProgram("an input of an unknown range");
    }
    spec.fields.push_back(std::move(field));
  }
  std::vector<bool> brought(kMaxSpecSymbols);
  for (const InputField& field : spec.fields)
    for (const SpecSize& dim : field.dims)
      if (dim.symbol >= 0) brought[dim.symbol] = true;
  for (size_t s = 0; s < spec.symbols.size(); ++s)
    if (!brought[s]) throw InvalidProgram("each symbol is the size of an input");
  spec.limits.resize(spec.symbols.size());
  for (const auto& [name, limit] : value.at("limits").object()) {
    Limit made;
    made.low = limit[0].integer();
    if (!limit[1].is_null()) made.high = limit[1].integer();
    if (made.low < 1 || (!limit[1].is_null() && made.low > made.high))
      throw InvalidProgram("limits of at least 1, in order");
    if (const int found = spec.symbol(name); found >= 0) spec.limits[found] = made;
  }
  return spec;
}

InputSpec InputSpec::of(const std::vector<int>& positions) const {
  InputSpec part{symbols, limits, {}};
  for (const int i : positions) part.fields.push_back(fields[i]);
  return part;
}

bool InputSpec::admits(const Array* arrays, SpecSizes& sizes) const {
  SpecSizes found = sizes;
  for (size_t i = 0; i < fields.size(); ++i)
    if (!fits(fields[i], limits, arrays[i], found)) return false;
  for (size_t i = 0; i < fields.size(); ++i)
    if (!sound(fields[i], arrays[i], found)) return false;
  sizes = found;
  return true;
}

std::string InputSpec::refusal(const Array* arrays, SpecSizes sizes) const {
  for (size_t i = 0; i < fields.size(); ++i) {
    const InputField& field = fields[i];
    std::string wanted, given;
    for (const SpecSize& dim : field.dims) {
      if (!wanted.empty()) wanted += ", ";
      const bool known = dim.symbol < 0 || sizes[dim.symbol] >= 0;
      wanted += known ? std::to_string(value_of(dim, sizes)) : symbols[dim.symbol];
      if (known) continue;
      const Limit& limit = limits[dim.symbol];
      wanted += " (" + std::to_string(limit.low) +
                (limit.high < 0 ? " or more)" : ".." + std::to_string(limit.high) + ")");
    }
    if (fits(field, limits, arrays[i], sizes)) continue;
    for (int d = 0; d < arrays[i].dims; ++d)
      given += (d ? ", " : "") + std::to_string(arrays[i].sizes[d]);
    return field.name + ": expected " + kDtypeNames[static_cast<int>(field.dtype)] + " [" + wanted +
           "], got " + kDtypeNames[static_cast<int>(arrays[i].dtype)] + " [" + given + "]";
  }
  for (size_t i = 0; i < fields.size(); ++i) {
    const InputField& field = fields[i];
    if (sound(field, arrays[i], sizes)) continue;
    if (field.dtype == Dtype::f32) return field.name + ": expected numbers, got a NaN";
    return field.name + ": expected values in 0.." +
           std::to_string(value_of(*field.rows, sizes, 1) - 1) + ", got one outside";
  }
  return "";
}

int InputSpec::symbol(std::string_view name) const {
  const auto found = std::find(symbols.begin(), symbols.end(), name);
  return found == symbols.end() ? -1 : static_cast<int>(found - symbols.begin());
}

}  // namespace fastrec::engine
