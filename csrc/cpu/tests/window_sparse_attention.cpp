#include "window_sparse_attention/window_sparse_attention.h"

#include <algorithm>

#include "attention_inputs.h"
#include "check.h"
#include "cpu_features.h"
#include "float16.h"

namespace fastrec::tests {
namespace {

namespace op = window_sparse_attention;
using op::Dtype;

template <class T>
std::vector<uint8_t> encoded_as(const std::vector<float>& values) {
  std::vector<uint8_t> bytes(values.size() * sizeof(T));
  for (size_t i = 0; i < values.size(); ++i) {
    T element;
    from_float(values[i], element);
    std::memcpy(&bytes[i * sizeof(T)], &element, sizeof(T));
  }
  return bytes;
}

template <class T>
std::vector<float> decoded_as(const std::vector<uint8_t>& bytes) {
  std::vector<float> values(bytes.size() / sizeof(T));
  for (size_t i = 0; i < values.size(); ++i) {
    T element;
    std::memcpy(&element, &bytes[i * sizeof(T)], sizeof(T));
    values[i] = to_float(element);
  }
  return values;
}

std::vector<uint8_t> encoded(const std::vector<float>& values, Dtype dtype) {
  return dtype == Dtype::f32    ? encoded_as<float>(values)
         : dtype == Dtype::bf16 ? encoded_as<Bf16>(values)
                                : encoded_as<F16>(values);
}

std::vector<float> decoded(const std::vector<uint8_t>& bytes, Dtype dtype) {
  return dtype == Dtype::f32    ? decoded_as<float>(bytes)
         : dtype == Dtype::bf16 ? decoded_as<Bf16>(bytes)
                                : decoded_as<F16>(bytes);
}

struct Case {
  Sizes sizes;  // jagged: one batch of all rows
  Seen seen;
  Dtype dtype = Dtype::f32;
  bool together = false;
  std::vector<int64_t> lengths = {}, cu_seqlens = {};
  bool one_list = false;  // the first head's distances for all
};

struct Results {
  std::vector<uint8_t> out, dq, dk, dv;
  std::vector<float> lse;
};

class Comparison {
 public:
  explicit Comparison(const Case& c) : c_(c), pattern_{c.seen.window, c.seen.causal, {}} {
    pattern_.distances = c.seen.distances;
    if (c.one_list) pattern_.distances.resize(1);
    Random random(11);
    const auto rows = [&](bool keys) {
      std::vector<float> values = random.floats(c.sizes.elements());
      if (keys) spoil_beyond(c.lengths, c.sizes, c.together, NAN, &values);
      return encoded(values, c.dtype);
    };
    q_ = rows(false);
    k_ = rows(true);
    v_ = rows(true);
    d_out_ = rows(false);
    d_lse_ = random.floats(c.sizes.rows_of_all());
  }

  void run() {
    Results expected;
    as_scalar([&] {
      forward(Place::heap, true, &expected);
      from_ = expected;
      backward(Place::heap, &expected);
    });
    Results first;
    Isa isa = Isa::scalar;
    for_every_setting(name(), [&](Place place) {
      Results actual;
      forward(place, true, &actual);
      backward(place, &actual);
      agree(actual, expected);
      // Neither the number of threads nor where the memory lies changes a bit.
      if (first.out.empty() || isa != active_isa()) {
        first = actual;
        isa = active_isa();
      }
      CHECK(actual.out == first.out && actual.dq == first.dq && actual.dk == first.dk &&
            actual.dv == first.dv);
      Results alone;
      forward(place, false, &alone);
      CHECK(alone.out == first.out);
    });
  }

 private:
  std::string name() const {
    return text_of(c_.sizes) + " " + c_.seen.text() + " dtype " +
           std::to_string(static_cast<int>(c_.dtype)) + (c_.together ? " together" : "") +
           (c_.lengths.empty() ? "" : " lengths") + (c_.cu_seqlens.empty() ? "" : " jagged");
  }

  op::View view(void* data, int64_t dims) const {
    Sizes sizes = c_.sizes;
    sizes.dims = dims;
    const Strides at(sizes, c_.together);
    return {data, at.batch, at.head, at.row};
  }
  op::View view(const Buffer<uint8_t>& buffer) const {
    return view(const_cast<uint8_t*>(buffer.data()), c_.sizes.dims);
  }
  op::View view(const Buffer<float>& buffer) const {
    return view(const_cast<float*>(buffer.data()), 1);
  }
  float scale() const { return 1.0f / std::sqrt(static_cast<float>(c_.sizes.dims)); }
  op::Shape shape(const Buffer<int64_t>& lengths, const Buffer<int64_t>& starts) const {
    const int64_t jagged = static_cast<int64_t>(starts.size()) - 1;
    return {c_.dtype,
            starts.size() ? jagged : c_.sizes.batch,
            c_.sizes.heads,
            c_.sizes.rows,
            c_.sizes.dims,
            lengths.size() ? lengths.data() : nullptr,
            starts.size() ? starts.data() : nullptr};
  }

  void forward(Place place, bool with_lse, Results* to) const {
    const Buffer<uint8_t> q(q_, place), k(k_, place), v(v_, place);
    const Buffer<int64_t> lengths(c_.lengths, place), starts(c_.cu_seqlens, place);
    Buffer<uint8_t> out(q.size(), place);
    Buffer<float> lse(d_lse_.size(), place);
    CHECK(op::forward({shape(lengths, starts), &pattern_, scale(), view(q), view(k), view(v),
                       view(out), with_lse ? view(lse) : op::View{}}) == -1);
    to->out = out.values();
    to->lse = lse.values();
  }

  // From the scalar twin's out and lse, so that only this step's errors count.
  void backward(Place place, Results* to) const {
    const Buffer<uint8_t> q(q_, place), k(k_, place), v(v_, place), out(from_.out, place),
        d_out(d_out_, place);
    const Buffer<float> lse(from_.lse, place), d_lse(d_lse_, place);
    const Buffer<int64_t> lengths(c_.lengths, place), starts(c_.cu_seqlens, place);
    Buffer<uint8_t> dq(q.size(), place), dk(q.size(), place), dv(q.size(), place);
    Buffer<float> delta(d_lse_.size(), place);
    CHECK(op::backward({shape(lengths, starts), &pattern_, scale(), view(q), view(k), view(v),
                        view(out), view(lse), view(d_out), view(d_lse), view(dq), view(dk),
                        view(dv), view(delta)}) == -1);
    to->dq = dq.values();
    to->dk = dk.values();
    to->dv = dv.values();
  }

  // Every input lies in [-1, 1]. A score is a sum of D products, off by at most D^1.5 * 2^-24 after
  // the scale; exp and the maximum add 2^-20. A weight is off by twice that share, e, its row's
  // sums of keys by as much again, and either implementation by that: 8 e. A score's gradient is at
  // most 2 D + 1 of a weight, and goes into dq and dk times scale. Weights of a column (dk, dv) sum
  // to what rows give it, about 1, here below 4. A result of 16 bits near a tie falls to either
  // side: one unit in its last place.
  void agree(const Results& actual, const Results& expected) const {
    const double dims = static_cast<double>(c_.sizes.dims);
    const double e = std::pow(dims, 1.5) * 0x1p-24 + 0x1p-20;
    const double unit = c_.dtype == Dtype::f32 ? 0 : c_.dtype == Dtype::bf16 ? 0x1p-7 : 0x1p-10;
    const auto near = [&](const std::vector<uint8_t>& a, const std::vector<uint8_t>& b,
                          double factor) {
      return worst_error(decoded(a, c_.dtype), decoded(b, c_.dtype), 8 * e * factor, unit) <= 1;
    };
    const double slope = (2 * dims + 1) * scale();
    CHECK(near(actual.out, expected.out, 1));
    CHECK(near(actual.dq, expected.dq, slope));
    CHECK(near(actual.dk, expected.dk, 4 * slope));
    CHECK(near(actual.dv, expected.dv, 4));
    for (size_t i = 0; i < expected.lse.size(); ++i)
      CHECK(actual.lse[i] == expected.lse[i] ||
            std::abs(actual.lse[i] - expected.lse[i]) <= 8 * e * (1 + std::log(1e4)));
  }

  Case c_;
  op::Pattern pattern_;
  std::vector<uint8_t> q_, k_, v_, d_out_;
  std::vector<float> d_lse_;
  Results from_;
};

void compare(const Case& c) { Comparison(c).run(); }

constexpr Dtype kDtypes[] = {Dtype::f32, Dtype::bf16, Dtype::f16};

}  // namespace

TEST(window_sparse_attention_rows) {
  for (const bool causal : {false, true})
    for (const Seen& seen : patterns_of_two_heads(causal))
      for (const int64_t rows : {0, 1, 7, 15, 16, 17, 33, 65})
        compare({{1, 2, rows, 16}, seen, kDtypes[rows % 3], rows % 2 == 0});
}

TEST(window_sparse_attention_dims) {
  const Seen seen{2, false, {{5, 16, 30}, {3}}};
  for (const Dtype dtype : kDtypes)
    for (const int64_t dims : {1, 15, 16, 17, 31, 32, 33, 47, 48, 63, 64, 65, 256})
      compare({{1, 2, 19, dims}, seen, dtype, dims % 2 == 0});
}

TEST(window_sparse_attention_lengths) {
  for (const Dtype dtype : kDtypes)
    for (const bool causal : {false, true})
      for (const bool together : {false, true})
        compare({{5, 2, 35, 20},
                 {3, causal, {{4, 9, 33}, {16, 18}}},
                 dtype,
                 together,
                 {0, 1, 16, 17, 35}});
}

TEST(window_sparse_attention_jagged) {
  for (const Dtype dtype : kDtypes)
    for (const bool causal : {false, true})
      for (const bool together : {false, true})
        compare({{1, 2, 70, 24},
                 {3, causal, {{4, 9, 33}, {16, 18}}},
                 dtype,
                 together,
                 {},
                 {0, 0, 1, 17, 33, 70, 70}});
}

TEST(window_sparse_attention_parts_and_threads) {
  // Above the work from which threads share it, and more than one part of a head.
  compare({{1, 2, 150, 32}, {4, false, {{20, 130}, {5}}}, Dtype::f32, true});
  compare({{2, 2, 130, 16}, {9, true, {{20, 128}, {}}}, Dtype::bf16, false, {129, 40}});
  compare({{1, 3, 30, 8}, {1, false, {{7}}}, Dtype::f16, false, {}, {}, true});
}

TEST(window_sparse_attention_names_what_is_out_of_order) {
  const Buffer<float> x(4 * 8, Place::heap);
  Buffer<float> out(4 * 8, Place::heap);
  const op::Pattern pattern{1, false, {{}}};
  const op::View rows{const_cast<float*>(x.data()), 16, 8, 8}, to{out.data(), 16, 8, 8};
  const auto run = [&](const op::Shape& shape) {
    return op::forward({shape, &pattern, 1.0f, rows, rows, rows, to, {}});
  };
  for (const int64_t bad : {int64_t{-1}, int64_t{3}, INT64_MAX}) {
    const Buffer<int64_t> lengths({2, bad}, Place::before_guard);
    CHECK(run({Dtype::f32, 2, 1, 2, 8, lengths.data(), nullptr}) == 1);
  }
  const auto jagged = [&](const std::vector<int64_t>& values) {
    const Buffer<int64_t> starts(values, Place::before_guard);
    return run(
        {Dtype::f32, static_cast<int64_t>(values.size()) - 1, 1, 4, 8, nullptr, starts.data()});
  };
  CHECK(jagged({1, 4}) == 0);
  CHECK(jagged({0, 3, 2, 4}) == 2);
  CHECK(jagged({0, INT64_MAX, 4}) == 1);
  CHECK(jagged({0, 3}) == 1);
  CHECK(jagged({0}) == 0);
}

}  // namespace fastrec::tests
