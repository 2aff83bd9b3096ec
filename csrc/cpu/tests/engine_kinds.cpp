// The registry of step kinds: each tells every trait, and its fields survive JSON.
#include <algorithm>
#include <cmath>
#include <limits>
#include <set>

#include "engine/cost.h"
#include "engine/make_kind.h"
#include "engine/map_program.h"
#include "engine_samples.h"

namespace fastrec::tests {
namespace {

json::Value example(const FieldRule& rule) {
  if (rule.type == "flag") return true;
  if (rule.type == "integer") return 7;
  if (rule.type == "number") return 0.25;
  if (rule.type == "choice") return rule.choices.back();
  if (rule.type == "lists") return json::List{json::List{3, 5}, json::List{}};
  CHECK(rule.type == "program");
  return json::parse(R"([["index",1],["integer",-3],["add_i64",0,2],["number","nan"]])");
}

json::Object examples(const Kind& kind) {
  json::Object fields;
  for (const FieldRule& rule : kind.fields) fields.emplace_back(rule.name, example(rule));
  return fields;
}

bool reads(const Kind& kind, const json::Object& fields) {
  try {
    return kind.read(fields) != nullptr;
  } catch (const json::Error&) {
    return false;
  }
}

bool names_once(const std::vector<std::string>& names) {
  return std::set<std::string>(names.begin(), names.end()).size() == names.size();
}

}  // namespace

TEST(kinds_tell_every_trait) {
  std::vector<std::string> names;
  for (const Kind& kind : kinds()) {
    std::snprintf(setting, sizeof(setting), "%s", kind.name);
    names.push_back(kind.name);
    CHECK(find_kind(kind.name) == &kind);
    CHECK(kind.read && kind.write && kind.rows && kind.check && kind.run && kind.cost &&
          kind.shown && kind.reads_index);
    CHECK(*kind.traits.op == '\0' || kind.isa);
    CHECK(*kind.traits.shown);
    std::vector<std::string> operands, fields;
    for (const OperandRule& rule : kind.operands) operands.push_back(rule.name);
    for (const FieldRule& rule : kind.fields) {
      fields.push_back(rule.name);
      CHECK((rule.type == "choice") == !rule.choices.empty());
    }
    CHECK(names_once(operands) && names_once(fields));
    for (const OperandRule& rule : kind.operands) CHECK(!(rule.output && rule.strided));
    const Checked& checked = kind.traits.checked;
    const int count = static_cast<int>(kind.operands.size());
    if (checked.operand >= 0) {
      CHECK(checked.operand < count && checked.limit_operand >= 0 && checked.limit_operand < count);
      CHECK(std::string(checked.what) == "ids" || std::string(checked.what) == "lengths");
    }
    const auto all = samples();
    CHECK(std::any_of(all.begin(), all.end(), [&](auto& of) { return of.first == kind.name; }));
  }
  CHECK(names_once(names));
  CHECK(!find_kind("no such kind") && !find_kind(""));
}

TEST(kinds_keep_their_fields) {
  for (const Kind& kind : kinds()) {
    std::snprintf(setting, sizeof(setting), "%s", kind.name);
    const json::Object fields = examples(kind);
    const auto read = kind.read(fields);
    CHECK(json::write(kind.write(read.get())) == json::write(json::Value(fields)));
    json::Object more = fields;
    more.emplace_back("no_such_field", 1);
    CHECK(!reads(kind, more));
    for (size_t f = 0; f < fields.size(); ++f) {
      json::Object fewer = fields, other = fields;
      fewer.erase(fewer.begin() + static_cast<int64_t>(f));
      CHECK(!reads(kind, fewer));
      std::vector<json::Value> wrong = {nullptr, json::Object{}, "no such choice",
                                        json::List{json::List{"x"}}};
      if (kind.fields[f].type == "number") {
        wrong.emplace_back(std::numeric_limits<double>::infinity());
        wrong.emplace_back(std::nan(""));
      } else {
        wrong.emplace_back(0.5);
      }
      for (const json::Value& value : wrong) {
        other[f].second = value;
        CHECK(!reads(kind, other));
      }
    }
  }
}

TEST(kinds_say_what_their_samples_cost) {
  for (auto& [name, sample] : samples()) {
    std::snprintf(setting, sizeof(setting), "%s", name.c_str());
    const StepCost cost = cost_of(sample.program, sample.step(), {3, 5});
    CHECK(cost.cost.written_bytes > 0 && cost.cost.activation_bytes > 0);
    CHECK((cost.bytes > 0) == !sample.constants.empty());
    CHECK(cost.cost.peak.has_value() || name == "resumed_attention");
    CHECK(cost.cost.macs.value_or(0) > 0 || !cost.cost.peak || cost.cost.peak->empty());
  }
}

TEST(kinds_count_bytes_and_products) {
  const auto cost = [](const char* kind, size_t at = 0) {
    for (auto& [name, sample] : samples())
      if (name == kind && at-- == 0) return cost_of(sample.program, sample.step(), {3, 5});
    CHECK(false);
    return StepCost{};
  };
  // x [3, 5, 7] by [33, 7] with a bias.
  const Cost linear = cost("linear", 1).cost;
  CHECK(linear.activation_bytes == 3 * 5 * 7 * 4 && linear.written_bytes == 3 * 5 * 33 * 4);
  CHECK(linear.constant_bytes == (33 * 7 + 33) * 4 && linear.macs == 3 * 5 * 33 * 7);
  CHECK(linear.peak == "fp32" && linear.density == 1.0);
  // Of 7 rows, all: 15 ids.
  CHECK(cost("gather", 1).cost.constant_bytes == 7 * (5 + 4));
  CHECK(std::string(cost("gather", 0).shown) == "gather" && !cost("gather", 0).isa);
  CHECK(std::string(cost("gather", 1).shown) == "int8_embedding" && cost("gather", 1).isa);
  // 4 of 6 groups.
  const Cost int8 = cost("linear_int8").cost;
  CHECK(int8.density == 0.6667 && int8.macs == 3 * 5 * 35 * 9 * 4 / 6 && int8.peak == "int8");
  // Each head's row i of 5 meets i + 1 keys, for scores and for values.
  CHECK(cost("causal_attention").cost.macs == 2 * 3 * 2 * 4 * 15);
  // Window 1: 5 + 2 * 4 pairs a head; one head also the distances 2 (2 * 3) and 4 (2 * 1).
  CHECK(cost("window_sparse_attention").cost.macs == 2 * 3 * 4 * (2 * 13 + 8));
  // Broadcast rows count once.
  CHECK(cost("map").cost.activation_bytes == (3 * 3 + 3 * 5 * 3) * 4);
}

TEST(attention_costs_follow_the_lengths) {
  for (auto& [name, sample] : samples()) {
    if (name != "attention") continue;
    const int64_t lengths[] = {2, 0, 5};
    const std::byte* inputs[5] = {};
    inputs[4] = reinterpret_cast<const std::byte*>(lengths);
    const auto cost = cost_of(sample.program, sample.step(), {3, 5}, inputs).cost;
    const auto full = cost_of(sample.program, sample.step(), {3, 5}).cost;
    CHECK(cost.macs == 2 * (2 + 5 + 5) * 2 * 5 * 4 && full.macs == 2 * 15 * 2 * 5 * 4);
    CHECK(full.activation_bytes - cost.activation_bytes == 2 * 4 * 2 * 4 * 3);
  }
}

TEST(causal_kinds_may_be_resumed) {
  const Kind& resumed = *find_kind("resumed_attention");
  std::vector<std::string> found;
  for (auto& [name, sample] : samples()) {
    const ProgramStep& step = sample.step();
    if (!step.kind->resumed) continue;
    const auto fields = step.kind->resumed(step.fields.get());
    if (!fields) continue;
    found.push_back(name);
    const json::Value written = resumed.write(fields.get());
    CHECK(written.at("scale").number() == 0.5);
    CHECK(written.at("has_pattern").flag() == (name == "window_sparse_attention"));
  }
  CHECK(found == std::vector<std::string>({"causal_attention", "window_sparse_attention"}));
}

TEST(maps_count_positions_on) {
  const Kind& map = *find_kind("map");
  const auto moved = [&](const char* program, int inputs, int dim) {
    const auto fields = map.read(json::Object{{"program", json::parse(program)}});
    const auto made = map.moved_on(fields.get(), inputs, dim);
    CHECK((made != nullptr) == map.reads_index(fields.get(), dim));
    return made ? json::write(map.write(made.get()).at("program")) : "";
  };
  CHECK(moved(R"([["add_f32",0,1]])", 2, 1).empty());
  CHECK(moved(R"([["index",0],["to_f32",2],["add_f32",0,3]])", 2, 1).empty());
  CHECK(moved(R"([["number",2.5],["index",1],["to_f32",3],["where_f32",0,2,4]])", 2, 1) ==
        R"([["number",2.5],["index",1],["add_i64",4,2],["to_f32",5],["where_f32",0,3,6]])");
}

// A kind that is no part of the library: one file, and nothing else knows it.
namespace {

struct Halve {
  static constexpr const char* name = "halve";
  enum { x, y };
  static constexpr OperandRule operands[] = {{.name = "x"}, {.name = "y", .output = true}};
  struct Fields {
    double factor = 0.5;

    template <class V>
    void each(V& visit) {
      visit("factor", factor);
    }
  };
  static constexpr Traits traits = {.op = "", .shown = "halve", .users = Users::apart};

  static Rows rows(const Fields&) { return Rows::elements; }
  static void check(const StepCheck& check, const Fields&) {
    check.dense(x, {Dtype::f32});
    check.dense(y, {Dtype::f32});
    check.elements(y, product(check.sizes(x)), "as many elements");
  }
  static Status run(const Fields& fields, Tensors operands, const void*) {
    for (int64_t i = 0; i < operands[x].count(); ++i)
      operands[y].as<float>()[i] = operands[x].as<float>()[i] * static_cast<float>(fields.factor);
    return {};
  }
  static void cost(const Fields&, Tensors, Cost& cost) { cost.peak = ""; }
};

}  // namespace

TEST(a_new_kind_is_one_struct) {
  const Kind kind = make_kind<Halve>();
  const auto fields = kind.read(json::Object{{"factor", 0.25}});
  const std::vector<float> x = {2, 4};
  std::vector<float> y(2);
  const std::vector<Tensor> operands = {tensor(x.data(), Dtype::f32, {2}),
                                        tensor(y.data(), Dtype::f32, {2})};
  CHECK(kind.run(fields.get(), operands, nullptr).fault == Fault::none);
  CHECK(y == std::vector<float>({0.5f, 1.0f}));
  CHECK(!kind.prepare && !kind.tiled && !kind.resumed && !kind.moved_on && !kind.isa);
}

}  // namespace fastrec::tests
