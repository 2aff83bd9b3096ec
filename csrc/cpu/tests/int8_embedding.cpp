#include "int8_embedding/int8_embedding.h"

#include "check.h"

namespace fastrec::tests {

TEST(int8_embedding_is_exact_within_bounds) {
  Random random(1);
  for (const int64_t dims : {1, 15, 16, 17, 32, 63, 64, 65, 128, 130})
    for (const int64_t count : {0, 1, 7, 9, 300}) {
      const int64_t rows = 11;
      const auto table = random.integers<int8_t>(rows * dims, -128, 127);
      const auto scale = random.floats(rows);
      auto ids = random.integers<int64_t>(count, 0, rows - 1);
      if (count) ids[0] = 0, ids[count - 1] = rows - 1;
      std::vector<float> expected;
      for (const int64_t id : ids)
        for (int64_t d = 0; d < dims; ++d)
          expected.push_back(static_cast<float>(table[id * dims + d]) * scale[id]);
      for_every_setting(
          "dims " + std::to_string(dims) + " count " + std::to_string(count), [&](Place place) {
            const Buffer<int8_t> t(table, place);
            const Buffer<float> s(scale, place);
            const Buffer<int64_t> i(ids, place);
            Buffer<float> out(expected.size(), place);
            CHECK(int8_embedding::run(
                      {i.data(), t.data(), s.data(), out.data(), count, rows, dims}) == -1);
            CHECK(out.values() == expected);
          });
    }
}

TEST(int8_embedding_reads_no_row_outside) {
  for (const int64_t bad : {int64_t{-1}, int64_t{3}, INT64_MIN, INT64_MAX})
    for_every_setting("bad id", [&](Place place) {
      const Buffer<int8_t> table(3 * 8, place);
      const Buffer<float> scale(3, place);
      const Buffer<int64_t> ids({0, 2, bad}, place);
      Buffer<float> out(3 * 8, place);
      CHECK(int8_embedding::run({ids.data(), table.data(), scale.data(), out.data(), 3, 3, 8}) ==
            2);
    });
}

}  // namespace fastrec::tests
