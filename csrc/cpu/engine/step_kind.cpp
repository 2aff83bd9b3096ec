#include "engine/step_kind.h"

#include "engine/make_kind.h"
#include "engine/steps/kinds.h"

namespace fastrec::engine {

#define FASTREC_DECLARE_KIND(name) Kind name##_kind();
FASTREC_STEP_KINDS(FASTREC_DECLARE_KIND)
#undef FASTREC_DECLARE_KIND

int Kind::operand(std::string_view of) const {
  for (size_t i = 0; i < operands.size(); ++i)
    if (of == operands[i].name) return static_cast<int>(i);
  return -1;
}

std::span<const Kind> kinds() {
#define FASTREC_MAKE_KIND(name) name##_kind(),
  static const std::vector<Kind> all = {FASTREC_STEP_KINDS(FASTREC_MAKE_KIND)};
#undef FASTREC_MAKE_KIND
  return all;
}

const Kind* find_kind(std::string_view name) {
  for (const Kind& kind : kinds())
    if (name == kind.name) return &kind;
  return nullptr;
}

int64_t bytes_of(Dtype dtype) {
  switch (dtype) {
    case Dtype::f32:
    case Dtype::i32:
      return 4;
    case Dtype::i64:
      return 8;
    case Dtype::u8:
    case Dtype::s8:
    case Dtype::b8:
      return 1;
  }
  return 0;
}

const json::Value& ReadFields::of(const char* name) {
  current_ = name;
  ++read_;
  return fields_.at(name);
}

size_t ReadFields::choice(const char* name, Names names) {
  const std::string& given = of(name).text();
  std::string known;
  for (size_t i = 0; i < names.size(); ++i) {
    if (given == names[i]) return i;
    known += std::string(i ? ", " : "") + names[i];
  }
  throw json::Error("expected one of " + known + ", got " + given);
}

void ReadFields::end() {
  current_ = "fields";
  if (fields_.object().size() != read_) throw json::Error("fields that a step does not have");
}

}  // namespace fastrec::engine
