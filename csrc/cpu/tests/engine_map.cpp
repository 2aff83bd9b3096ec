// The interpreter of map steps: every instruction on blocks that are full, partial or strided.
#include <algorithm>
#include <cmath>

#include "engine/map_ops.h"
#include "engine_plans.h"

namespace fastrec::tests {
namespace {

constexpr int64_t kSizes[] = {0, 1, 127, 128, 129, 300, 40'000};  // the last one on threads

Tensor line(const void* data, Dtype dtype, int64_t size, int64_t stride = 1) {
  Tensor tensor{};
  tensor.data = static_cast<std::byte*>(const_cast<void*>(data));
  tensor.dtype = dtype;
  tensor.dims = 1;
  tensor.sizes[0] = size;
  tensor.strides[0] = stride;
  return tensor;
}

void run_program(const std::vector<Tensor>& operands, json::List program) {
  CHECK(run_step("map", operands, {{"program", std::move(program)}}).fault == Fault::none);
}

// A call of `op` on the first registers.
json::List instruction(MapOp op) {
  json::List row{kMapOpNames[static_cast<int>(op)]};
  for (int o = 0; o < kMapOpReads[static_cast<int>(op)]; ++o) row.push_back(o);
  return row;
}

// Same number, or a NaN both.
bool same(float a, float b) { return a == b || (std::isnan(a) && std::isnan(b)); }

std::vector<float> numbers_of(int64_t count, uint64_t seed) {
  auto values = Random(seed).floats(count, 4.0f);
  constexpr float kEdges[] = {NAN, INFINITY, -INFINITY, -0.0f, 1e-40f, 3e38f, 0.0f};
  for (int64_t i = static_cast<int64_t>(seed); i < count; i += 5) values[i] = kEdges[i % 7];
  return values;
}

std::vector<int64_t> integers_of(int64_t count, uint64_t seed) {
  auto values = Random(seed).integers<int64_t>(count, -3, 3);
  constexpr int64_t kEdges[] = {INT64_MAX, INT64_MIN, 0, -1};
  for (int64_t i = static_cast<int64_t>(seed); i < count; i += 5) values[i] = kEdges[i % 4];
  return values;
}

// As torch: integers wrap.
int64_t wrapped(uint64_t value) { return static_cast<int64_t>(value); }

template <class From, class To, class Expected>
void compare(MapOp op, Dtype from, Dtype to, const Expected& expected) {
  for (const int64_t count : kSizes) {
    std::vector<From> x, y;
    if constexpr (std::is_same_v<From, float>)
      x = numbers_of(count, 1), y = numbers_of(count, 2);
    else
      x = integers_of(count, 1), y = integers_of(count, 2);
    for (const Place place : {Place::heap, Place::before_guard, Place::after_guard}) {
      std::snprintf(setting, sizeof(setting), "%s of %d, place %d",
                    kMapOpNames[static_cast<int>(op)], static_cast<int>(count),
                    static_cast<int>(place));
      const Buffer<From> xs(x, place), ys(y, place);
      Buffer<To> out(x.size(), place);
      run_program(
          {line(xs.data(), from, count), line(ys.data(), from, count), line(out.data(), to, count)},
          {instruction(op)});
      for (int64_t i = 0; i < count; ++i) {
        const To wanted = static_cast<To>(expected(x[i], y[i]));
        if constexpr (std::is_same_v<To, float>)
          CHECK(same(out.data()[i], wanted));
        else
          CHECK(out.data()[i] == wanted);
      }
    }
  }
}

template <class Expected>
void compare_f32(MapOp op, const Expected& expected) {
  compare<float, float>(op, Dtype::f32, Dtype::f32, expected);
}
template <class Expected>
void compare_i64(MapOp op, const Expected& expected) {
  compare<int64_t, int64_t>(op, Dtype::i64, Dtype::i64, expected);
}
template <class From, class Expected>
void compare_bool(MapOp op, Dtype from, const Expected& expected) {
  compare<From, uint8_t>(op, from, Dtype::b8, expected);
}

}  // namespace

TEST(map_of_floats) {
  compare_f32(MapOp::add_f32, [](float a, float b) { return a + b; });
  compare_f32(MapOp::sub_f32, [](float a, float b) { return a - b; });
  compare_f32(MapOp::mul_f32, [](float a, float b) { return a * b; });
  compare_f32(MapOp::div_f32, [](float a, float b) { return a / b; });
  compare_f32(MapOp::max_f32, [](float a, float b) {
    return std::isnan(a) || std::isnan(b) ? NAN : std::max(a, b);
  });
  compare_f32(MapOp::min_f32, [](float a, float b) {
    return std::isnan(a) || std::isnan(b) ? NAN : std::min(a, b);
  });
  compare_f32(MapOp::neg_f32, [](float a, float) { return -a; });
  compare_f32(MapOp::abs_f32, [](float a, float) { return std::fabs(a); });
  compare_f32(MapOp::exp_f32, [](float a, float) { return std::exp(a); });
  compare_f32(MapOp::log_f32, [](float a, float) { return std::log(a); });
  compare_f32(MapOp::sqrt_f32, [](float a, float) { return std::sqrt(a); });
  compare_f32(MapOp::tanh_f32, [](float a, float) { return std::tanh(a); });
  compare_f32(MapOp::relu_f32, [](float a, float) { return a < 0 ? 0.0f : a; });
  compare_bool<float>(MapOp::lt_f32, Dtype::f32, [](float a, float b) { return a < b; });
  compare_bool<float>(MapOp::le_f32, Dtype::f32, [](float a, float b) { return a <= b; });
  compare_bool<float>(MapOp::eq_f32, Dtype::f32, [](float a, float b) { return a == b; });
}

TEST(map_of_integers) {
  compare_i64(MapOp::add_i64, [](uint64_t a, uint64_t b) { return wrapped(a + b); });
  compare_i64(MapOp::sub_i64, [](uint64_t a, uint64_t b) { return wrapped(a - b); });
  compare_i64(MapOp::mul_i64, [](uint64_t a, uint64_t b) { return wrapped(a * b); });
  compare_i64(MapOp::max_i64, [](int64_t a, int64_t b) { return std::max(a, b); });
  compare_i64(MapOp::min_i64, [](int64_t a, int64_t b) { return std::min(a, b); });
  compare_i64(MapOp::and_i64, [](int64_t a, int64_t b) { return a & b; });
  compare_i64(MapOp::or_i64, [](int64_t a, int64_t b) { return a | b; });
  compare_bool<int64_t>(MapOp::not_i64, Dtype::i64, [](int64_t a, int64_t) { return a == 0; });
  compare_bool<int64_t>(MapOp::lt_i64, Dtype::i64, [](int64_t a, int64_t b) { return a < b; });
  compare_bool<int64_t>(MapOp::le_i64, Dtype::i64, [](int64_t a, int64_t b) { return a <= b; });
  compare_bool<int64_t>(MapOp::eq_i64, Dtype::i64, [](int64_t a, int64_t b) { return a == b; });
  compare<int64_t, float>(MapOp::to_f32, Dtype::i64, Dtype::f32,
                          [](int64_t a, int64_t) { return static_cast<float>(a); });
}

// where(mask[b], x[b, :, d], 7) + position of the column, for x with the columns outside the rows.
TEST(map_of_broadcast_and_strided_operands) {
  for (const int64_t columns : {1, 127, 128, 129, 9000})
    for (const Place place : {Place::heap, Place::before_guard, Place::after_guard}) {
      std::snprintf(setting, sizeof(setting), "columns %d, place %d", static_cast<int>(columns),
                    static_cast<int>(place));
      constexpr int64_t kRows = 5;
      const auto values = Random(3).floats(kRows * columns);
      const Buffer<float> x(values, place);
      const Buffer<uint8_t> mask({1, 0, 1, 1, 0}, place);
      Buffer<float> out(values.size(), place);
      const auto tensor = [&](const void* data, Dtype dtype, int64_t row, int64_t column) {
        Tensor t = line(data, dtype, kRows, row);
        t.dims = 2;
        t.sizes[1] = columns;
        t.strides[1] = column;
        return t;
      };
      run_program({tensor(mask.data(), Dtype::b8, 1, 0), tensor(x.data(), Dtype::f32, 1, kRows),
                   tensor(out.data(), Dtype::f32, columns, 1)},
                  json::parse(R"([["number", 7], ["where_f32", 0, 1, 2], ["index", 1],
                                  ["to_f32", 4], ["add_f32", 3, 5]])")
                      .list());
      for (int64_t r = 0; r < kRows; ++r)
        for (int64_t c = 0; c < columns; ++c)
          CHECK(out.data()[r * columns + c] ==
                (mask.data()[r] ? values[c * kRows + r] : 7.0f) + static_cast<float>(c));
    }
}

}  // namespace fastrec::tests
