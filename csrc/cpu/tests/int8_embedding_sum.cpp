#include "int8_embedding_sum/int8_embedding_sum.h"

#include <cmath>
#include <memory>

#include "check.h"
#include "element.h"

namespace fastrec::tests {
namespace {

using namespace int8_embedding_sum;

constexpr int64_t kPadding = -1;  // ids where a table has some; else the row's number is the id

struct Source {
  Type type;
  int64_t count;
  bool has_ids;
  int64_t padding_id;
};

struct Values {
  std::vector<uint8_t> rows;
  std::vector<float> scale;
  std::vector<int64_t> ids;
};

template <class T>
std::vector<uint8_t> bytes_of(const std::vector<T>& values) {
  const auto* begin = reinterpret_cast<const uint8_t*>(values.data());
  return std::vector<uint8_t>(begin, begin + values.size() * sizeof(T));
}

Values values_of(const Source& source, int64_t rows, int64_t dims, Random& random) {
  Values values;
  const int64_t count = source.count * dims;
  if (source.type == Type::s8) {
    values.rows = bytes_of(random.integers<int8_t>(count, -128, 127));
    values.scale = random.floats(source.count, 0.02f);
  } else if (source.type == Type::f32) {
    values.rows = bytes_of(random.floats(count));
  } else {
    std::vector<uint16_t> halves;
    for (const float value : random.floats(count)) halves.push_back(to_bf16(value));
    values.rows = bytes_of(halves);
  }
  if (source.has_ids) {
    values.ids = random.integers<int64_t>(rows, 0, source.count - 1);
    if (rows) values.ids[0] = 0, values.ids[rows - 1] = source.count - 1;
    if (source.padding_id >= 0)
      for (int64_t n = 1; n < rows; n += 2) values.ids[n] = source.padding_id;
  }
  return values;
}

// The same buffers for the lifetime of a call.
struct Placed {
  Placed(const Values& values, Place place)
      : rows(values.rows, place), scale(values.scale, place), ids(values.ids, place) {}
  Buffer<uint8_t> rows;
  Buffer<float> scale;
  Buffer<int64_t> ids;
};

struct Outcome {
  Result result;
  std::vector<uint8_t> out;
};

Outcome run_at(const std::vector<Source>& sources, const std::vector<Values>& values, int64_t rows,
               int64_t dims, bool out_u8, Place place) {
  std::vector<std::unique_ptr<Placed>> placed;
  Call call{};
  for (size_t t = 0; t < sources.size(); ++t) {
    placed.push_back(std::make_unique<Placed>(values[t], place));
    const Source& source = sources[t];
    call.tables[t] = {placed[t]->rows.data(),
                      source.type == Type::s8 ? placed[t]->scale.data() : nullptr,
                      source.has_ids ? placed[t]->ids.data() : nullptr,
                      source.type,
                      source.count,
                      source.count,
                      source.padding_id};
  }
  Buffer<uint8_t> out(static_cast<size_t>(rows * dims) * (out_u8 ? 1 : 4), place);
  call.table_count = static_cast<int>(sources.size());
  call.out = out.data();
  call.out_u8 = out_u8;
  call.quantisation = {0.03f, 100};
  call.rows = rows;
  call.dims = dims;
  const Result result = run(call);
  return {result, out.values()};
}

void compare(const std::vector<Source>& sources, int64_t rows, int64_t dims, bool out_u8) {
  Random random(17);
  std::vector<Values> values;
  for (const Source& source : sources) values.push_back(values_of(source, rows, dims, random));
  Outcome expected;
  as_scalar([&] { expected = run_at(sources, values, rows, dims, out_u8, Place::heap); });
  CHECK(expected.result.status == Status::done);
  for_every_setting("rows " + std::to_string(rows) + " dims " + std::to_string(dims) + " tables " +
                        std::to_string(sources.size()),
                    [&](Place place) {
                      const Outcome actual = run_at(sources, values, rows, dims, out_u8, place);
                      CHECK(actual.result.status == Status::done && actual.out == expected.out);
                    });
}

}  // namespace

TEST(int8_embedding_sum_is_exact_within_bounds) {
  for (const int64_t dims : {1, 15, 16, 17, 63, 64, 65, 127, 130})
    for (const bool out_u8 : {false, true}) {
      for (const Type type : {Type::s8, Type::f32, Type::bf16})
        compare({{type, 7, true, kPadding}}, 19, dims, out_u8);
      // A padding id may lie in the table or outside.
      compare({{Type::s8, 7, true, 0}, {Type::bf16, 5, true, 5}, {Type::f32, 3, false, kPadding}},
              19, dims, out_u8);
      compare(std::vector<Source>(kMaxTables, {Type::s8, 4, true, 1}), 2, dims, out_u8);
    }
}

TEST(int8_embedding_sum_rows_and_threads) {
  for (const int64_t rows : {0, 1, 7, 8, 9})
    compare({{Type::s8, 11, true, kPadding}, {Type::f32, 2, false, kPadding}}, rows, 24, false);
  compare({}, 3, 20, true);  // no table: zeros
  // The large table is prefetched; the work is beyond one thread's share.
  compare({{Type::s8, 5000, true, 5000}, {Type::f32, 1300, true, 3}, {Type::s8, 9, false, -1}},
          1100, 65, true);
}

TEST(int8_embedding_sum_reads_no_row_outside) {
  const std::vector<Source> sources{{Type::f32, 2, false, kPadding}, {Type::s8, 3, true, 4}};
  Random random(19);
  for (const int64_t bad : {int64_t{-1}, int64_t{3}, INT64_MIN, INT64_MAX}) {
    std::vector<Values> values;
    for (const Source& source : sources) values.push_back(values_of(source, 5, 8, random));
    values[1].ids = {0, 4, 2, bad, bad};
    for_every_setting("bad id", [&](Place place) {
      const Outcome outcome = run_at(sources, values, 5, 8, true, place);
      CHECK(outcome.result.status == Status::bad_id);
      CHECK(outcome.result.table == 1 && outcome.result.position == 3);
      for (const uint8_t byte : outcome.out) CHECK(byte == 0xff);  // nothing is written
    });
  }
}

TEST(int8_embedding_sum_tells_a_nan) {
  const std::vector<Source> sources{{Type::f32, 2, true, kPadding}};
  for (const int64_t dims : {1, 16, 65, 130}) {
    std::vector<float> rows(static_cast<size_t>(2 * dims), INFINITY);
    rows.back() = NAN;
    const std::vector<Values> values{{bytes_of(rows), {}, {0, 1, 0}}};
    for_every_setting("NaN among " + std::to_string(dims), [&](Place place) {
      CHECK(run_at(sources, values, 3, dims, true, place).result.status == Status::not_a_number);
      CHECK(run_at(sources, values, 3, dims, false, place).result.status == Status::done);
    });
  }
}

}  // namespace fastrec::tests
