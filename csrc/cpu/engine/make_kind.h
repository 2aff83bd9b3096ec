// make_kind<T>(): the Kind of a struct T as step_kind.h describes it.
//
// A kind's Fields name each field once, in `each(visit)`; the visitors here read them from JSON,
// write them and describe them. A field is a bool, an int64_t, a double, an enum with the names of
// its values, lists of integers, or a type with `kType`, `read` and `write` of its own.
#pragma once

#include <cmath>
#include <concepts>
#include <type_traits>

#include "engine/step_kind.h"
#include "isa.h"

namespace fastrec::engine {

using Lists = std::vector<std::vector<int64_t>>;
using Names = std::span<const char* const>;  // of an enum's values, from 0

// A field of a type of its own.
template <class T>
concept OwnField = requires(const T& field, const json::Value& value) {
  { T::kType } -> std::convertible_to<const char*>;
  { T::read(value) } -> std::same_as<T>;
  { field.write() } -> std::same_as<json::Value>;
};

class ReadFields {
 public:
  explicit ReadFields(const json::Value& fields) : fields_(fields) {}

  void operator()(const char* name, bool& to) { to = of(name).flag(); }
  void operator()(const char* name, int64_t& to) { to = of(name).integer(); }
  void operator()(const char* name, double& to) {
    to = of(name).number();
    if (!std::isfinite(to)) throw json::Error(std::string("a field that is not finite: ") + name);
  }
  template <class Enum>
    requires std::is_enum_v<Enum>
  void operator()(const char* name, Enum& to, Names names) {
    to = static_cast<Enum>(choice(name, names));
  }
  void operator()(const char* name, Lists& to) {
    to.clear();
    for (const json::Value& list : of(name).list()) {
      std::vector<int64_t>& integers = to.emplace_back();
      for (const json::Value& value : list.list()) integers.push_back(value.integer());
    }
  }
  template <OwnField T>
  void operator()(const char* name, T& to) {
    to = T::read(of(name));
  }

  // Throws where there are fields that were not asked for.
  void end();
  // The field that was read last.
  const char* current() const { return current_; }

 private:
  const json::Value& of(const char* name);
  size_t choice(const char* name, Names names);

  const json::Value& fields_;
  const char* current_ = "fields";
  size_t read_ = 0;
};

class WriteFields {
 public:
  void operator()(const char* name, const bool& value) { add(name, value); }
  void operator()(const char* name, const int64_t& value) { add(name, value); }
  void operator()(const char* name, const double& value) { add(name, value); }
  template <class Enum>
    requires std::is_enum_v<Enum>
  void operator()(const char* name, const Enum& value, Names names) {
    add(name, names[static_cast<size_t>(value)]);
  }
  void operator()(const char* name, const Lists& lists) {
    json::List written;
    for (const auto& integers : lists)
      written.emplace_back(json::List(integers.begin(), integers.end()));
    add(name, std::move(written));
  }
  template <OwnField T>
  void operator()(const char* name, const T& value) {
    add(name, value.write());
  }

  json::Object written;

 private:
  void add(const char* name, json::Value value) { written.emplace_back(name, std::move(value)); }
};

class DescribeFields {
 public:
  void operator()(const char* name, const bool&) { add(name, "flag"); }
  void operator()(const char* name, const int64_t&) { add(name, "integer"); }
  void operator()(const char* name, const double&) { add(name, "number"); }
  template <class Enum>
    requires std::is_enum_v<Enum>
  void operator()(const char* name, const Enum&, Names names) {
    add(name, "choice");
    rules.back().choices.assign(names.begin(), names.end());
  }
  void operator()(const char* name, const Lists&) { add(name, "lists"); }
  template <OwnField T>
  void operator()(const char* name, const T&) {
    add(name, T::kType);
  }

  std::vector<FieldRule> rules;

 private:
  void add(const char* name, const char* type) { rules.push_back({name, type, {}}); }
};

// A kind without fields.
struct NoFields {
  template <class V>
  void each(V&) {}
};

constexpr bool sound_operands(std::span<const OperandRule> rules) {
  for (size_t i = 0; i < rules.size(); ++i)
    if ((rules[i].many && i > 0) || (rules[i].optional && rules[i].many)) return false;
  return !rules.empty() && rules.size() <= kMaxOperands && rules.back().output &&
         !rules.back().optional;
}

template <class T>
Kind make_kind() {
  using Fields = typename T::Fields;
  static_assert(sound_operands(T::operands),
                "operands under a name of many come first, the result comes last");
  const auto of = [](const void* fields) -> const Fields& {
    return *static_cast<const Fields*>(fields);
  };
  using Of = decltype(of);
  Kind kind{};
  kind.name = T::name;
  kind.operands = T::operands;
  kind.traits = T::traits;
  DescribeFields described;
  Fields().each(described);
  kind.fields = std::move(described.rules);
  kind.read = [](const json::Value& value) -> std::shared_ptr<const void> {
    auto fields = std::make_shared<Fields>();
    ReadFields visit(value);
    try {
      fields->each(visit);
      visit.end();
    } catch (const json::Error& error) {
      throw json::Error(std::string(T::name) + ": " + visit.current() + ": " + error.what());
    }
    return fields;
  };
  kind.write = [](const void* fields) {
    Fields copy = Of()(fields);  // `each` serves reading too
    WriteFields visit;
    copy.each(visit);
    return json::Value(std::move(visit.written));
  };
  kind.rows = [](const void* fields) { return T::rows(Of()(fields)); };
  kind.check = [](const StepCheck& check, const void* fields) { T::check(check, Of()(fields)); };
  kind.run = [](const void* fields, Tensors operands, const void* prepared) {
    return T::run(Of()(fields), operands, prepared);
  };
  kind.cost = [](const void* fields, Tensors operands, Cost& cost) {
    T::cost(Of()(fields), operands, cost);
  };
  kind.shown = [](const void* fields, Tensors operands) -> const char* {
    if constexpr (requires { T::shown(Of()(fields), operands); })
      return T::shown(Of()(fields), operands);
    else
      return T::traits.shown;
  };
  if constexpr (requires { &T::prepare; })
    kind.prepare = [](const void* fields, Tensors operands) {
      return T::prepare(Of()(fields), operands);
    };
  if constexpr (requires { &T::tiled; })
    kind.tiled = [](const void* fields) { return T::tiled(Of()(fields)); };
  if constexpr (requires { &T::resumed; })
    kind.resumed = [](const void* fields) { return T::resumed(Of()(fields)); };
  kind.reads_index = [](const void* fields, int dim) {
    if constexpr (requires { &T::reads_index; })
      return T::reads_index(Of()(fields), dim);
    else
      return false;
  };
  if constexpr (requires { &T::moved_on; })
    kind.moved_on = [](const void* fields, int inputs, int dim) {
      return T::moved_on(Of()(fields), inputs, dim);
    };
  if constexpr (requires { &T::isa; })
    kind.isa = [](const void* fields, Tensors operands) {
      const std::optional<Isa> isa = T::isa(Of()(fields), operands);
      return isa ? kIsaTable[static_cast<int>(*isa)].name : nullptr;
    };
  else
    static_assert(*T::traits.op == '\0', "a kind that an op's kernel runs tells its isa");
  return kind;
}

}  // namespace fastrec::engine
