// JSON values: the header of an engine file, and what the Python front end hands over.
//
// Strict (RFC 8259), bounded in depth, and in memory by a small multiple of the text. Integers are
// 64 bits and stay integers; a number with a fraction or an exponent is a double, which is finite.
#pragma once

#include <cstdint>
#include <stdexcept>
#include <string>
#include <string_view>
#include <utility>
#include <variant>
#include <vector>

namespace fastrec::engine::json {

class Error : public std::runtime_error {
  using std::runtime_error::runtime_error;
};

class Value;
using List = std::vector<Value>;
using Member = std::pair<std::string, Value>;
// In the order of the text; a name that comes twice is refused.
using Object = std::vector<Member>;

class Value {
 public:
  Value() = default;
  Value(std::nullptr_t) {}
  Value(bool value) : value_(value) {}
  Value(int value) : value_(static_cast<int64_t>(value)) {}
  Value(int64_t value) : value_(value) {}
  Value(double value) : value_(value) {}
  Value(const char* value) : value_(std::string(value)) {}
  Value(std::string value) : value_(std::move(value)) {}
  Value(List value) : value_(std::move(value)) {}
  Value(Object value) : value_(std::move(value)) {}

  bool is_null() const { return std::holds_alternative<std::monostate>(value_); }
  bool is_text() const { return std::holds_alternative<std::string>(value_); }
  bool is_integer() const { return std::holds_alternative<int64_t>(value_); }
  bool is_list() const { return std::holds_alternative<List>(value_); }

  // Each throws Error where the value is of another type.
  bool flag() const;
  int64_t integer() const;
  double number() const;  // an integer too
  const std::string& text() const;
  const List& list() const;
  const Object& object() const;

  // A member: `at` throws Error where the object has none, `find` gives null.
  const Value& at(std::string_view name) const;
  const Value* find(std::string_view name) const;
  // An item of a list; throws Error where it is too short.
  const Value& operator[](size_t index) const;

  // Calls `visitor` with the value as it is held.
  template <class Visitor>
  void visit(Visitor&& visitor) const {
    std::visit(visitor, value_);
  }

 private:
  std::variant<std::monostate, bool, int64_t, double, std::string, List, Object> value_;
};

// Throws Error: what is wrong, and at which byte.
Value parse(std::string_view text);
std::string write(const Value& value);

}  // namespace fastrec::engine::json
