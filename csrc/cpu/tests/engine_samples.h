// A small sound program for each kind of step.
#pragma once

#include <string>
#include <utility>

#include "engine/check.h"
#include "engine_plans.h"

namespace fastrec::tests {

// Inputs, the step, and a map that computes the output.
struct Sample {
  Program program;
  std::vector<std::vector<std::byte>> constants;

  Sample() = default;
  Sample(const Sample& other) : program(other.program), constants(other.constants) {
    point_to_constants();
  }
  Sample& operator=(const Sample&) = delete;

  // The step that the sample is of: the last but one.
  ProgramStep& step() { return program.steps[program.steps.size() - 2]; }
  void point_to_constants() {
    for (size_t c = 0; c < constants.size(); ++c)
      program.constants[c] = {constants[c].data(), static_cast<int64_t>(constants[c].size())};
  }
};

class SampleMaker {
 public:
  SampleMaker() {
    sample_.program.symbols = {"B", "L"};
    input(Dtype::f32, {B, L});
  }

  View input(Dtype dtype, const Shape& shape) {
    const int index = static_cast<int>(sample_.program.inputs.size());
    const View view = buffer(Space::input, dtype, shape, index);
    sample_.program.inputs.push_back(view.buffer);
    return view;
  }
  View arena(Dtype dtype, const Shape& shape) { return buffer(Space::arena, dtype, shape, 0); }
  template <class T>
  View constant(Dtype dtype, const Shape& shape, const std::vector<T>& values) {
    const auto* bytes = reinterpret_cast<const std::byte*>(values.data());
    sample_.constants.emplace_back(bytes, bytes + values.size() * sizeof(T));
    sample_.program.constants.emplace_back();
    return buffer(Space::constant, dtype, shape, static_cast<int>(sample_.constants.size()) - 1);
  }
  View floats(const Shape& shape) {
    return constant(Dtype::f32, shape, random_.floats(product(shape).coefficient));
  }
  // [B, 2, L, 4] of an input [B, L, 2, 4].
  View heads(Dtype dtype = Dtype::f32) {
    View view = input(dtype, {B, L, 2, 4});
    view.sizes = {B, 2, L, 4};
    view.strides = {extent(8, 0, 1), 4, 8, 1};
    return view;
  }

  void before(const char* kind, const std::vector<View>& operands, json::Object fields) {
    sample_.program.steps.push_back(
        {find_kind(kind), "", operands, find_kind(kind)->read(std::move(fields))});
  }
  Sample with(const char* kind, const std::vector<View>& operands, json::Object fields = {}) {
    before(kind, operands, std::move(fields));
    Program& program = sample_.program;
    program.outputs.push_back(buffer(Space::output, Dtype::f32, {B, 1}, 0));
    before("map", program.outputs, {{"program", json::parse(R"([["number", 1]])")}});
    sample_.point_to_constants();
    return sample_;
  }

  Random& random() { return random_; }

 private:
  View buffer(Space space, Dtype dtype, const Shape& shape, int index) {
    sample_.program.buffers.push_back({space, dtype, shape, index});
    return sample_.program.whole(static_cast<int>(sample_.program.buffers.size()) - 1);
  }

  Sample sample_;
  Random random_{91};
};

inline const View kNone;

// By the kind's name; several of a kind.
std::vector<std::pair<std::string, Sample>> samples();

inline const std::vector<Limit> kSampleLimits = {{1, -1}, {1, 64}};

}  // namespace fastrec::tests
