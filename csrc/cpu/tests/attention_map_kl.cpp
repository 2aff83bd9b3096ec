#include "attention_map_kl/attention_map_kl.h"

#include <algorithm>

#include "attention_inputs.h"
#include "check.h"
#include "cpu_features.h"

namespace fastrec::tests {
namespace {

namespace op = attention_map_kl;

struct Case {
  Sizes sizes;  // of the student
  int64_t teacher_dims;
  Seen seen;
  bool teacher_causal = false;
  bool together = false;
  std::vector<int64_t> lengths = {};
};

struct Results {
  std::vector<float> kl, dq, dk;
  bool operator==(const Results&) const = default;
};

float scale_of(int64_t dims) { return 1.0f / std::sqrt(static_cast<float>(dims)); }

struct Inputs {
  explicit Inputs(const Case& c) {
    Random random(17);
    const auto rows = [&](int64_t dims) {
      Sizes sizes = c.sizes;
      sizes.dims = dims;
      std::vector<float> values = random.floats(sizes.elements());
      spoil_beyond(c.lengths, sizes, c.together, NAN, &values);
      return values;
    };
    tq = rows(c.teacher_dims);
    tk = rows(c.teacher_dims);
    sq = rows(c.sizes.dims);
    sk = rows(c.sizes.dims);
  }
  std::vector<float> tq, tk, sq, sk;
};

int64_t run_at(const Case& c, const Inputs& inputs, Place place, bool gradients, Results* to) {
  const Buffer<float> tq(inputs.tq, place), tk(inputs.tk, place), sq(inputs.sq, place),
      sk(inputs.sk, place);
  const Buffer<int64_t> lengths(c.lengths, place), distances(c.seen.flat(), place),
      starts(c.seen.starts(), place);
  Buffer<float> kl(c.sizes.batch * c.sizes.heads, place), dq(sq.size(), place),
      dk(sk.size(), place);
  const auto rows = [&](const Buffer<float>& buffer, int64_t dims) {
    Sizes sizes = c.sizes;
    sizes.dims = dims;
    const Strides at(sizes, c.together);
    return op::Rows{buffer.data(), at.batch, at.head, at.row, dims};
  };
  const int64_t code = op::run({rows(tq, c.teacher_dims),
                                rows(tk, c.teacher_dims),
                                rows(sq, c.sizes.dims),
                                rows(sk, c.sizes.dims),
                                scale_of(c.teacher_dims),
                                scale_of(c.sizes.dims),
                                c.teacher_causal,
                                kl.data(),
                                gradients ? dq.data() : nullptr,
                                gradients ? dk.data() : nullptr,
                                c.lengths.empty() ? nullptr : lengths.data(),
                                {c.seen.window, c.seen.causal, distances.data(), starts.data()},
                                c.sizes.batch,
                                c.sizes.heads,
                                c.sizes.rows});
  to->kl = kl.values();
  if (gradients) {
    to->dq = dq.values();
    to->dk = dk.values();
  }
  return code;
}

// Every input lies in [-1, 1]: a score is off by at most D^1.5 * 2^-24 after its scale, exp and log
// add 2^-20, and a probability is off by twice the share, e; two maps and two implementations: 8 e.
// A row's kl is at most the largest difference of scores, 2 (sqrt(Dt) + sqrt(Ds)), and is off by
// that times the share; L rows a head. A gradient is scale times a sum of slopes; those of a key
// (dk) come from rows whose probabilities for it sum to about 1, here below 4.
void compare(const Case& c) {
  const Inputs inputs(c);
  Results expected;
  as_scalar([&] { run_at(c, inputs, Place::heap, true, &expected); });
  const double dims = static_cast<double>(std::max(c.teacher_dims, c.sizes.dims));
  const double e = 8 * (std::pow(dims, 1.5) * 0x1p-24 + 0x1p-20);
  const double rows = static_cast<double>(c.sizes.rows + 1);
  Results first;
  Isa isa = Isa::scalar;
  for_every_setting(
      text_of(c.sizes) + " teacher's D" + std::to_string(c.teacher_dims) + " " + c.seen.text() +
          (c.teacher_causal ? " teacher causal" : "") + (c.together ? " together" : "") +
          (c.lengths.empty() ? "" : " lengths"),
      [&](Place place) {
        Results actual;
        CHECK(run_at(c, inputs, place, true, &actual) == -1);
        CHECK(worst_error(actual.kl, expected.kl, e * rows * (1 + 4 * std::sqrt(dims)), 0) <= 1);
        CHECK(worst_error(actual.dq, expected.dq, e * scale_of(c.sizes.dims), 0) <= 1);
        CHECK(worst_error(actual.dk, expected.dk, 4 * e * scale_of(c.sizes.dims), 0) <= 1);
        // Neither the number of threads nor where the memory lies changes a bit.
        if (first.kl.empty() || isa != active_isa()) {
          first = actual;
          isa = active_isa();
        }
        CHECK(actual == first);
        Results alone;
        CHECK(run_at(c, inputs, place, false, &alone) == -1);
        CHECK(worst_error(alone.kl, expected.kl, e * rows * (1 + 4 * std::sqrt(dims)), 0) <= 1);
      });
}

}  // namespace

TEST(attention_map_kl_rows) {
  for (const bool causal : {false, true})
    for (const Seen& seen : patterns_of_two_heads(causal))
      for (const int64_t rows : {0, 1, 7, 8, 9, 15, 16, 17, 33, 65})
        compare({{1, 2, rows, 16}, 20, seen, rows % 2 == 1, rows % 3 == 0});
}

TEST(attention_map_kl_dims) {
  const Seen seen{2, false, {{5, 16, 30}, {3}}};
  for (const int64_t dims : {1, 7, 8, 9, 15, 16, 17, 31, 32, 33, 63, 64, 65}) {
    compare({{1, 2, 19, dims}, 5, seen, false, dims % 2 == 0});
    compare({{1, 2, 19, 3}, dims, seen, true, dims % 2 == 0});
  }
}

TEST(attention_map_kl_lengths) {
  for (const bool causal : {false, true})
    for (const bool teacher_causal : {false, true})
      for (const bool together : {false, true})
        compare({{5, 2, 35, 20},
                 12,
                 {3, causal, {{4, 9, 33}, {16, 18}}},
                 teacher_causal,
                 together,
                 {0, 1, 16, 17, 35}});
}

TEST(attention_map_kl_threads) {
  compare({{2, 2, 130, 24}, 32, {9, false, {{20, 128}, {}}}, true, true, {129, 40}});
  compare({{1, 2, 300, 33}, 8, {4, true, {{20, 130, 299}, {5}}}});
}

TEST(attention_map_kl_names_a_bad_length) {
  for (const int64_t bad : {int64_t{-1}, int64_t{10}, INT64_MAX}) {
    Case c{{2, 1, 9, 4}, 4, {1, false, {{}}}};
    const Inputs inputs(c);
    c.lengths = {9, bad};
    Results ignored;
    CHECK(run_at(c, inputs, Place::before_guard, true, &ignored) == 1);
  }
}

}  // namespace fastrec::tests
