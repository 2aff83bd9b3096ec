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
  compare_f32(MapOp::log_f32, [](float a, float) { return std::log(a); });
  compare_f32(MapOp::sqrt_f32, [](float a, float) { return std::sqrt(a); });
  compare_f32(MapOp::relu_f32, [](float a, float) { return a < 0 ? 0.0f : a; });
  compare_bool<float>(MapOp::lt_f32, Dtype::f32, [](float a, float b) { return a < b; });
  compare_bool<float>(MapOp::le_f32, Dtype::f32, [](float a, float b) { return a <= b; });
  compare_bool<float>(MapOp::eq_f32, Dtype::f32, [](float a, float b) { return a == b; });
}

// Our own functions: near the C library's in double, the same bits under every instruction set.
TEST(map_of_functions) {
  struct Function {
    MapOp op;
    double (*expected)(double);
    double absolute;
  };
  // The smallest normal numbers become 0; the pieces of GELU have an absolute error.
  const Function functions[] = {
      {MapOp::exp_f32, [](double a) { return std::exp(a); }, 2e-38},
      {MapOp::sigmoid_f32, [](double a) { return 1.0 / (1.0 + std::exp(-a)); }, 2e-38},
      {MapOp::silu_f32, [](double a) { return a / (1.0 + std::exp(-a)); }, 2e-36},
      {MapOp::tanh_f32, [](double a) { return std::tanh(a); }, 0},
      {MapOp::erf_f32, [](double a) { return std::erf(a); }, 0},
      {MapOp::gelu_f32, [](double a) { return 0.5 * a * (1 + std::erf(a * std::sqrt(0.5))); },
       5e-7},
  };
  auto values = Random(5).floats(3000, 3.0f);
  for (int i = 0; i < 1000; ++i) values[i] *= 40.0f;
  for (int i = 0; i < 1000; ++i) values[1000 + i] *= 1e-3f;
  for (const float edge : {INFINITY, -INFINITY, NAN, 0.0f, -0.0f, 88.7f, 89.0f, -87.0f, -1e9f})
    values.push_back(edge);
  const int64_t count = static_cast<int64_t>(values.size());
  for (const Function& function : functions) {
    std::vector<float> first;
    for_every_setting(kMapOpNames[static_cast<int>(function.op)], [&](Place place) {
      const Buffer<float> x(values, place);
      Buffer<float> out(values.size(), place);
      run_program({line(x.data(), Dtype::f32, count), line(out.data(), Dtype::f32, count)},
                  {instruction(function.op)});
      if (first.empty()) first = out.values();
      for (int64_t i = 0; i < count; ++i) {
        const float got = out.data()[i];
        const double wanted = function.expected(values[i]);
        CHECK(same(got, first[i]));
        if (std::isnan(wanted) || std::isnan(got)) {
          CHECK(std::isnan(wanted) == std::isnan(got) || std::isinf(values[i]));
          continue;
        }
        const bool beyond = std::isinf(static_cast<float>(wanted));
        CHECK(beyond ? std::isinf(got)
                     : std::fabs(got - wanted) <= function.absolute + 2.5e-7 * std::fabs(wanted));
      }
    });
  }
}

// Short rows share a block, whose rows may lie apart or be one row for all.
TEST(map_of_short_rows) {
  for (const int64_t width : {1, 3, 16, 50, 256, 257})
    for_every_setting("width " + std::to_string(width), [&](Place place) {
      constexpr int64_t kOuter = 3, kRows = 11;
      const auto values = Random(7).floats(kOuter * kRows * (width + 1));
      const auto shared = Random(8).floats(width);
      const auto factors = Random(9).floats(kOuter * kRows);
      const Buffer<float> x(values, place), row(shared, place), factor(factors, place);
      Buffer<float> out(static_cast<size_t>(kOuter * kRows * width), place);
      const auto tensor = [&](const void* data, int64_t outer, int64_t rows, int64_t column) {
        Tensor t = line(data, Dtype::f32, kOuter, outer);
        t.dims = 3;
        t.sizes[1] = kRows, t.strides[1] = rows;
        t.sizes[2] = width, t.strides[2] = column;
        return t;
      };
      run_program({tensor(x.data(), kRows * (width + 1), width + 1, 1), tensor(row.data(), 0, 0, 1),
                   tensor(factor.data(), kRows, 1, 0), tensor(out.data(), kRows * width, width, 1)},
                  json::parse(R"([["mul_f32", 0, 2], ["add_f32", 3, 1]])").list());
      for (int64_t r = 0; r < kOuter * kRows; ++r)
        for (int64_t c = 0; c < width; ++c)
          CHECK(out.data()[r * width + c] == values[r * (width + 1) + c] * factors[r] + shared[c]);
    });
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
