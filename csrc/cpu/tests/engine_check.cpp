// The check of programs: samples of every kind pass; what a hostile file may say of them is
// refused, or harmless when it runs.
#include <algorithm>
#include <cmath>
#include <memory>
#include <new>

#include "engine/map_ops.h"
#include "engine_samples.h"

namespace fastrec::tests {
namespace {

// The message, or nothing.
std::string refusal(const Sample& sample, const std::vector<Limit>& limits = kSampleLimits) {
  try {
    check(sample.program, limits);
    return "";
  } catch (const InvalidProgram& error) {
    return error.what();
  }
}

bool has(const std::string& text, const char* part) { return text.find(part) != text.npos; }

Sample sample_of(const char* kind, size_t which = 0) {
  for (auto& [name, sample] : samples())
    if (name == kind && which-- == 0) return sample;
  CHECK(false);
  return {};
}

int64_t elements(const Shape& shape, const Symbols& symbols) {
  int64_t count = 1;
  for (const Extent& size : shape) count *= size.at(symbols);
  return count;
}

// The check's promise, by counting; doubles hold what 64 bits may not.
bool lies_inside(const Program& program, const View& view, const Symbols& symbols) {
  double last = static_cast<double>(view.offset), elements = 1;
  for (size_t d = 0; d < view.sizes.size(); ++d) {
    const double size = view.sizes[d].roughly(symbols);
    if (size == 0) return true;
    last += (size - 1) * view.strides[d].roughly(symbols);
  }
  for (const Extent& size : program.buffers[view.buffer].shape) elements *= size.roughly(symbols);
  return last < elements || (last > 0x1p53 && last <= elements * (1 + 1e-12));
}

constexpr Place kPlaces[] = {Place::heap, Place::before_guard, Place::after_guard};
constexpr double kMostRun = 1 << 20;

// Runs each step on blocks of memory that nothing lies around.
void run(const Sample& sample, const Symbols& symbols, Place place, Random& random) {
  const Program& program = sample.program;
  double total = 0;
  for (const engine::Buffer& buffer : program.buffers) {
    double count = 8;
    for (const Extent& size : buffer.shape) count *= size.roughly(symbols);
    total += count;
  }
  if (total > kMostRun) return;
  std::vector<std::unique_ptr<tests::Buffer<std::byte>>> blocks;
  for (const engine::Buffer& buffer : program.buffers) {
    const int64_t count = elements(buffer.shape, symbols);
    const auto bytes = static_cast<size_t>(count * bytes_of(buffer.dtype));
    blocks.push_back(std::make_unique<tests::Buffer<std::byte>>(bytes, place));
    void* const to = blocks.back()->data();
    if (buffer.space == Space::constant)
      std::memcpy(to, program.constants[buffer.index].data, bytes);
    else if (buffer.dtype == Dtype::i64)
      std::ranges::copy(random.integers<int64_t>(count, -1, 6), static_cast<int64_t*>(to));
    else if (buffer.dtype == Dtype::f32)
      std::ranges::copy(random.floats(count), static_cast<float*>(to));
    else
      std::ranges::copy(random.integers<uint8_t>(bytes, 0, 255), static_cast<uint8_t*>(to));
  }
  for (const ProgramStep& step : program.steps) {
    std::vector<Tensor> tensors;
    double work = 1;
    for (const View& view : step.operands) {
      Tensor& t = tensors.emplace_back();
      if (view.absent()) continue;
      const engine::Buffer& buffer = program.buffers[view.buffer];
      t.dtype = buffer.dtype;
      t.data = blocks[view.buffer]->data() + view.offset * bytes_of(buffer.dtype);
      t.dims = static_cast<int>(view.sizes.size());
      double count = 1;
      for (int d = 0; d < t.dims; ++d) {
        t.sizes[d] = view.sizes[d].at(symbols);
        t.strides[d] = view.strides[d].at(symbols);
        count *= view.sizes[d].roughly(symbols);
      }
      work = std::max(work, count);
    }
    if (work > kMostRun) return;
    std::shared_ptr<void> prepared;
    if (step.kind->prepare) {
      // As the executor does: what is not constant has no address, and symbols no size.
      std::vector<Tensor> known = tensors;
      for (size_t o = 0; o < known.size(); ++o) {
        const View& view = step.operands[o];
        if (view.absent()) continue;
        if (program.buffers[view.buffer].space != Space::constant) known[o].data = nullptr;
        for (int d = 0; d < known[o].dims; ++d) {
          known[o].sizes[d] = view.sizes[d].at({});
          known[o].strides[d] = view.strides[d].at({});
        }
      }
      prepared = step.kind->prepare(step.fields.get(), known);
    }
    if (step.kind->run(step.fields.get(), tensors, prepared.get()).fault != Fault::none) return;
  }
}

// Changes to a program as a file may hold them.
class Mutator {
 public:
  explicit Mutator(uint64_t seed) : random_(seed) {}

  void change(Sample& sample) {
    Program& program = sample.program;
    ProgramStep& step = program.steps[pick(program.steps.size())];
    switch (pick(10)) {
      case 0:
        return change(program.buffers[pick(program.buffers.size())].shape);
      case 1: {
        engine::Buffer& buffer = program.buffers[pick(program.buffers.size())];
        if (pick(2))
          buffer.dtype = static_cast<Dtype>(pick(6));
        else
          buffer.space = static_cast<Space>(pick(4));
        return;
      }
      case 2:
        return change_constant(sample);
      case 3:
      case 4:
        return change_fields(step);
      case 5:
        // Both at once: a buffer and the views that take all of it.
        return change_all(program);
      default:
        return change(step.operands[pick(step.operands.size())], program);
    }
  }

 private:
  size_t pick(size_t count) {
    return count ? static_cast<size_t>(
                       random_.integers<int64_t>(1, 0, static_cast<int64_t>(count) - 1)[0])
                 : 0;
  }
  int64_t number() {
    static constexpr int64_t kNumbers[] = {
        0,        1,  2,         3,         4,         5,         8,         9,
        31,       33, 64,        128,       255,       256,       257,       1 << 16,
        1 << 30,  -1, INT32_MAX, INT64_MAX, INT64_MIN, 1LL << 31, 1LL << 40, (1LL << 40) + 1,
        1LL << 32};
    return kNumbers[pick(std::size(kNumbers))];
  }

  void change(Extent& extent) {
    if (pick(2))
      extent.coefficient = pick(2) ? number() : extent.coefficient + (pick(2) ? 1 : -1);
    else
      extent.exponent[pick(kMaxSymbols)] = static_cast<uint8_t>(pick(4) ? pick(3) : pick(40));
  }
  void change(Shape& shape) {
    if (shape.empty() || pick(8) == 0)
      shape.push_back(number());
    else if (pick(8) == 0)
      shape.erase(shape.begin() + static_cast<int64_t>(pick(shape.size())));
    else if (pick(4) == 0)
      std::swap(shape[pick(shape.size())], shape[pick(shape.size())]);
    else
      change(shape[pick(shape.size())]);
  }
  void change(View& view, const Program& program) {
    switch (pick(6)) {
      case 0:
        view.buffer = static_cast<int>(pick(program.buffers.size() + 2)) - 1;
        return;
      case 1:
        view.offset = pick(2) ? number() : view.offset + 1;
        return;
      case 2:
        return change(view.strides);
      case 3:
        return take_all(view, program);
      default:
        return change(view.sizes);
    }
  }
  // The view takes all of its buffer.
  static void take_all(View& view, const Program& program) {
    if (view.buffer < 0 || view.buffer >= static_cast<int>(program.buffers.size())) return;
    view.sizes = program.buffers[view.buffer].shape;
    double product = 1;
    for (const Extent& size : view.sizes)
      product *= std::abs(static_cast<double>(size.coefficient)) + 1;
    if (product < 1e15) view.strides = contiguous_strides(view.sizes);
  }
  void change_all(Program& program) {
    const int at = static_cast<int>(pick(program.buffers.size()));
    change(program.buffers[at].shape);
    for (ProgramStep& step : program.steps)
      for (View& view : step.operands)
        if (view.buffer == at) take_all(view, program);
  }
  void change_constant(Sample& sample) {
    if (sample.constants.empty()) return;
    auto& bytes = sample.constants[pick(sample.constants.size())];
    if (pick(4) == 0)
      bytes.resize(pick(bytes.size() + 8));
    else if (!bytes.empty())
      bytes[pick(bytes.size())] = static_cast<std::byte>(pick(256));
    sample.point_to_constants();
  }
  void change_fields(ProgramStep& step) {
    json::Object fields = step.kind->write(step.fields.get()).object();
    if (fields.empty()) return;
    const size_t at = pick(fields.size());
    fields[at].second = value(step.kind->fields[at]);
    try {
      step.fields = step.kind->read(fields);
    } catch (const json::Error&) {
    }
  }
  json::Value value(const FieldRule& rule) {
    static constexpr double kReals[] = {0, 1, -1, 0.5, 1e-320, 1e-45, 1e30, 1e39, 1e300, -1e300};
    if (rule.type == "flag") return pick(2) == 0;
    if (rule.type == "integer") return number();
    if (rule.type == "number") return kReals[pick(std::size(kReals))];
    if (rule.type == "choice") return rule.choices[pick(rule.choices.size())];
    json::List list;
    for (size_t i = 0, count = pick(4); i < count; ++i) {
      json::List row;
      if (rule.type == "program") row.push_back(kMapOpNames[pick(kMapOps)]);
      for (size_t j = 0, items = pick(4); j < items; ++j)
        row.push_back(pick(3) ? static_cast<int64_t>(pick(8)) : number());
      list.push_back(std::move(row));
    }
    return list;
  }

  Random random_;
};

}  // namespace

TEST(samples_of_every_kind_are_sound_and_run) {
  for (const auto& [name, sample] : samples()) {
    std::snprintf(setting, sizeof(setting), "%s", name.c_str());
    CHECK(refusal(sample).empty());
    Random random(97);
    for (const Symbols& symbols : {Symbols{1, 1}, Symbols{2, 5}, Symbols{3, 17}})
      for (const Place place : kPlaces) run(sample, symbols, place, random);
  }
}

TEST(hostile_programs_are_refused_or_harmless) {
  constexpr int kPrograms = 600;
  int accepted = 0, refused = 0;
  uint64_t seed = 0;
  for (const auto& [name, sample] : samples())
    for (int i = 0; i < kPrograms; ++i) {
      std::snprintf(setting, sizeof(setting), "%s, program %d", name.c_str(), i);
      Mutator mutator(++seed);
      Sample changed = sample;
      for (int changes = 0; changes <= i % 3; ++changes) mutator.change(changed);
      if (!refusal(changed).empty()) {
        ++refused;
        continue;
      }
      ++accepted;
      Random random(seed);
      for (const Symbols& symbols : {Symbols{1, 1}, Symbols{2, 5}, Symbols{3, 7}}) {
        for (const ProgramStep& step : changed.program.steps)
          for (const View& view : step.operands)
            CHECK(view.absent() || lies_inside(changed.program, view, symbols));
        try {
          run(changed, symbols, kPlaces[i % std::size(kPlaces)], random);
        } catch (const std::bad_alloc&) {
        }
      }
    }
  // Both happen, or this shows nothing.
  CHECK(accepted > kPrograms && refused > kPrograms);
}

TEST(programs_are_refused_with_what_is_wrong) {
  const auto message = [](const char* kind, auto&& change, size_t which = 0) {
    Sample sample = sample_of(kind, which);
    change(sample);
    return refusal(sample);
  };
  const auto field = [](const char* name, const json::Value& value) {
    return [name, value](Sample& sample) {
      ProgramStep& step = sample.step();
      json::Object fields = step.kind->write(step.fields.get()).object();
      for (auto& [known, held] : fields)
        if (known == name) held = value;
      step.fields = step.kind->read(fields);
    };
  };
  CHECK(message("linear", [](Sample& s) { s.step().operands[0].offset = 1; }) ==
        "an invalid plan: operands inside their buffers (step 0, linear)");
  CHECK(has(message("linear", [](Sample& s) { s.step().operands[1] = {}; }), "not optional"));
  CHECK(message("linear", [](Sample& s) { s.step().operands[2] = {}; }).empty());
  CHECK(has(message("linear", [](Sample& s) { s.step().operands.pop_back(); }), "operands"));
  CHECK(has(message("linear", [](Sample& s) { s.program.buffers[1].dtype = Dtype::s8; }),
            "float32, not int8"));
  CHECK(has(message("linear",
                    [](Sample& s) {
                      s.constants[0].pop_back();
                      s.point_to_constants();
                    }),
            "constants of their shape"));
  CHECK(has(message("linear", [](Sample& s) { s.program.steps.pop_back(); }),
            "an output that is computed"));
  CHECK(
      has(message("linear", [](Sample& s) { std::swap(s.program.inputs[0], s.program.inputs[1]); }),
          "input"));
  CHECK(has(message("linear", [](Sample& s) { s.program.symbols[1] = "B"; }), "symbols"));
  CHECK(has(message("layer_norm", field("y_zero_point", 256)), "zero points in 0..255"));
  CHECK(has(message("layer_norm", field("y_scale", 1e-320)), "scales above 0"));
  CHECK(has(message("quantize", field("scale", 0.0)), "scales above 0"));
  CHECK(has(message(
                "reduce",
                [](Sample& s) {
                  for (const View& v : s.step().operands)
                    s.program.buffers[v.buffer].dtype = Dtype::i64;
                },
                1),
            "float32, not int64"));
  CHECK(has(message("linear_int8", field("inputs", 10)), "as many inputs"));
  CHECK(has(message("linear_int8", field("outputs", INT64_MAX)), "sizes that sums"));
  CHECK(has(message("linear_int8", field("y_tiles", true)), "tiles"));
  const auto index = [](int constant, int32_t value) {
    return [constant, value](Sample& s) {
      std::memcpy(s.constants[constant].data() + 4, &value, 4);
      s.point_to_constants();
    };
  };
  CHECK(has(message("linear_int8", index(1, 3)), "groups among the inputs"));
  CHECK(has(message("linear_int8", index(1, -1)), "groups among the inputs"));
  CHECK(has(message("linear_int8", index(2, 5)), "panels one after another"));
  CHECK(has(message("masked_attention", field("caps", true), 1), "caps"));
  CHECK(has(message("separable_projection", field("before", 3)), "taps"));
  CHECK(has(message("window_sparse_attention", field("window", 2)), "rise beyond the window"));
  CHECK(has(message("window_sparse_attention", field("distances", json::List{})), "one list"));
  // Unlimited keys and a window over all: sums that 32 bits do not hold.
  Sample keys = sample_of("window_sparse_attention_int8", 1);
  CHECK(refusal(keys, {{1, -1}, {1, 65'536}}).empty());
  CHECK(has(refusal(keys, {{1, -1}, {1, 65'537}}), "65536 keys"));
  CHECK(has(refusal(keys, {{1, -1}, {1, -1}}), "65536 keys"));
  CHECK(has(refusal(keys, {{0, -1}, {1, -1}}), "sizes of at least 1"));
}

TEST(map_programs_read_what_is_there) {
  const auto refused = [](const char* program) {
    Sample sample = sample_of("map");
    ProgramStep& step = sample.step();
    try {
      step.fields = step.kind->read(json::Object{{"program", json::parse(program)}});
    } catch (const json::Error&) {
      return true;
    }
    return !refusal(sample).empty();
  };
  // Two inputs, a result of three dimensions.
  CHECK(!refused(R"([["add_f32",0,1],["number",1],["index",2],["where_f32",4,3,2]])"));
  CHECK(!refused("[]"));  // a copy
  for (const char* program :
       {R"([["add_f32",0]])", R"([["add_f32",0,1,1]])", R"([["no_such_op",0,1]])",
        R"([["add_f32",0,2]])", R"([["add_f32",-1,0]])", R"([["number"]])", R"([["index",3]])",
        R"([["number","infinite"]])", R"([["integer",0.5]])", R"([[]])", R"([3])",
        R"([["add_f32",0,99]])"})
    CHECK(refused(program));
  std::string longest = R"([["add_f32",0,1])";
  for (int p = 1; p < kMaxRegisters - 2; ++p) longest += R"(,["add_f32",0,1])";
  CHECK(!refused((longest + "]").c_str()));
  CHECK(refused((longest + R"(,["add_f32",0,1]])").c_str()));
}

}  // namespace fastrec::tests
