// Small models as engine files, made without Python.
#pragma once

#include <unistd.h>

#include <fstream>
#include <string>

#include "engine/file.h"
#include "engine/sha256.h"
#include "engine_plans.h"

namespace fastrec::tests {

inline const Extent M = Extent::of_symbol(2);

// An engine file in its two parts: checksums are made when it is put together.
struct FileParts {
  json::Value header;  // without "sections"
  std::vector<std::vector<std::byte>> constants;
};

class ModelMaker {
 public:
  explicit ModelMaker(std::vector<std::string> symbols) { program_.symbols = std::move(symbols); }

  View input(const char* name, const Shape& shape, json::Value rows) {
    json::List dims;
    for (const Extent& size : shape)
      for (size_t s = 0; s < program_.symbols.size(); ++s)
        if (size == Extent::of_symbol(static_cast<int>(s))) dims.push_back(program_.symbols[s]);
    fields_.push_back(json::Object{
        {"name", name}, {"dims", std::move(dims)}, {"dtype", "int64"}, {"rows", std::move(rows)}});
    const View view =
        buffer(Space::input, Dtype::i64, shape, static_cast<int>(program_.inputs.size()));
    program_.inputs.push_back(view.buffer);
    return view;
  }
  View arena(Dtype dtype, const Shape& shape) { return buffer(Space::arena, dtype, shape, 0); }
  template <class T>
  View constant(Dtype dtype, const Shape& shape, const std::vector<T>& values) {
    const auto* bytes = reinterpret_cast<const std::byte*>(values.data());
    constants_.emplace_back(bytes, bytes + values.size() * sizeof(T));
    return buffer(Space::constant, dtype, shape, static_cast<int>(constants_.size()) - 1);
  }
  View floats(const Shape& shape) {
    return constant(Dtype::f32, shape, random_.floats(product(shape).coefficient));
  }
  void step(const char* kind, const std::vector<View>& operands, json::Object fields = {}) {
    program_.steps.push_back(
        {find_kind(kind), kind, operands, find_kind(kind)->read(std::move(fields))});
  }
  FileParts made(const View& output) {
    program_.outputs = {output};
    json::Object limits;
    for (const std::string& symbol : program_.symbols)
      limits.emplace_back(symbol,
                          symbol == "L" ? json::List{1, 16} : json::List{1, json::Value(nullptr)});
    json::Object spec{{"fields", fields_}, {"limits", std::move(limits)}};
    return {json::Object{{"backend", "native"},
                         {"precision", "fp32"},
                         {"threads", 1},
                         {"requires", "scalar"},
                         {"spec", std::move(spec)},
                         {"program", write_program(program_)}},
            constants_};
  }
  Random& random() { return random_; }

 private:
  View buffer(Space space, Dtype dtype, const Shape& shape, int index) {
    program_.buffers.push_back({space, dtype, shape, index});
    return program_.whole(static_cast<int>(program_.buffers.size()) - 1);
  }

  Program program_;
  json::List fields_;
  std::vector<std::vector<std::byte>> constants_;
  Random random_{7};
};

// Items of a history and candidates: a mean, a layer in fp32, one in int8.
inline FileParts small_ranker() {
  ModelMaker m({"B", "L", "m"});
  const View item = m.input("item", {B, L}, 7), candidate = m.input("candidate", {B, M}, 7);
  const View table = m.floats({7, 4}), none;
  const View events = m.arena(Dtype::f32, {B, L, 4}), mean = m.arena(Dtype::f32, {B, 4});
  const View user = m.arena(Dtype::f32, {B, 4}), rows = m.arena(Dtype::f32, {B, M, 4});
  const View both = m.arena(Dtype::f32, {B, M, 4}), rounded = m.arena(Dtype::u8, {B, M, 4});
  const View scores = m.arena(Dtype::f32, {B, M, 1});
  m.step("gather", {item, table, none, events});
  m.step("reduce", {events, mean}, {{"operation", "mean"}});
  m.step("linear", {mean, m.floats({4, 4}), m.floats({4}), user}, {{"activation", "relu"}});
  m.step("gather", {candidate, table, none, rows});
  View of_each = user;
  of_each.sizes = rows.sizes;
  of_each.strides = {4, 0, 1};
  m.step("map", {rows, of_each, both}, {{"program", json::parse(R"([["add_f32",0,1]])")}});
  m.step("quantize", {both, rounded}, {{"scale", 0.02}, {"zero_point", 128}});
  const View values = m.constant(Dtype::s8, {1, 128}, m.random().integers<int8_t>(128, -99, 99));
  const View index = m.constant<int32_t>(Dtype::i32, {1}, {0});
  const View start = m.constant<int32_t>(Dtype::i32, {2}, {0, 1});
  m.step("linear_int8",
         {rounded, values, index, start, m.floats({1}), m.constant<int32_t>(Dtype::i32, {1}, {5}),
          m.floats({1}), scores},
         {{"outputs", 1},
          {"inputs", 4},
          {"x_scale", 0.02},
          {"x_zero_point", 128},
          {"activation", "none"},
          {"y_scale", 1.0},
          {"y_zero_point", 0},
          {"x_tiles", false},
          {"y_tiles", false}});
  return m.made(scores);
}

// A causal model without candidates: events may be appended.
inline FileParts small_sequence() {
  ModelMaker m({"B", "L"});
  const View item = m.input("item", {B, L}, 7);
  m.input("length", {B}, "L");
  const View none, events = m.arena(Dtype::f32, {B, L, 4});
  const View mixed = m.arena(Dtype::f32, {B, L, 4}), sum = m.arena(Dtype::f32, {B, L, 4});
  m.step("gather", {item, m.floats({7, 4}), none, events});
  View heads = events;
  heads.sizes = {B, 2, L, 2};
  heads.strides = {extent(4, 0, 1), 2, 4, 1};
  m.step("causal_attention", {heads, heads, heads, mixed}, {{"scale", 0.5}});
  m.step("map", {events, mixed, sum}, {{"program", json::parse(R"([["add_f32",0,1]])")}});
  return m.made(sum);
}

inline std::string put_together(const std::string& header, const std::string& sections) {
  std::string text = header;
  text.resize((text.size() + 63) / 64 * 64, ' ');
  std::string prefix =
      "\x89"
      "fastrec";
  const auto number = [&](uint64_t value, int bytes) {
    for (int i = 0; i < bytes; ++i) prefix += static_cast<char>(value >> 8 * i);
  };
  number(kFileVersion, 4);
  number(0, 4);
  number(text.size(), 8);
  number(64 + text.size() + sections.size(), 8);
  const std::string summed = prefix + text;
  const Sha256 digest = sha256(reinterpret_cast<const std::byte*>(summed.data()), summed.size());
  return prefix + std::string(digest.begin(), digest.end()) + text + sections;
}

inline std::string sections_of(const FileParts& parts) {
  std::string bytes;
  for (const auto& constant : parts.constants) {
    bytes.append(reinterpret_cast<const char*>(constant.data()), constant.size());
    bytes.resize((bytes.size() + 63) / 64 * 64, '\0');
  }
  return bytes;
}

// The file's bytes.
inline std::string engine_file(const FileParts& parts) {
  json::List sections;
  int64_t begin = 0;
  const std::string bytes = sections_of(parts);
  for (const auto& constant : parts.constants) {
    const auto size = static_cast<int64_t>(constant.size());
    const int64_t padded = (size + 63) / 64 * 64;
    const Sha256 digest = sha256(reinterpret_cast<const std::byte*>(bytes.data()) + begin, padded);
    sections.push_back(
        json::Object{{"begin", begin}, {"bytes", size}, {"sha256", hexadecimal(digest)}});
    begin += padded;
  }
  json::Object header = parts.header.object();
  header.emplace_back("sections", std::move(sections));
  return put_together(json::write(header), bytes);
}

// A file of a test, gone with it.
class TemporaryFile {
 public:
  explicit TemporaryFile(const std::string& content = "") {
    char name[] = "/tmp/fastrec_test_XXXXXX";
    const int handle = mkstemp(name);
    CHECK(handle >= 0);
    close(handle);
    path_ = name;
    write(content);
  }
  TemporaryFile(const TemporaryFile&) = delete;
  ~TemporaryFile() { unlink(path_.c_str()); }

  // In place.
  void write(const std::string& content) {
    std::ofstream(path_, std::ios::binary | std::ios::trunc) << content;
  }
  const std::string& path() const { return path_; }

 private:
  std::string path_;
};

}  // namespace fastrec::tests
