#include "pointwise_attention/pointwise_attention.h"

#include "attention_inputs.h"
#include "check.h"
#include "cpu_features.h"

namespace fastrec::tests {
namespace {

namespace op = pointwise_attention;

struct Case {
  Sizes sizes;  // jagged: one batch of all rows
  int64_t value_dims;
  bool causal = true, together = false, by_head = false;
  int64_t positions = 0, buckets = 0;
  std::vector<int64_t> lengths = {}, cu_seqlens = {}, targets = {};
};

struct Results {
  std::vector<float> out, dq, dk, dv, d_position, d_time;
  bool operator==(const Results&) const = default;
};

struct Inputs {
  explicit Inputs(const Case& c) {
    Random random(23);
    const auto rows = [&](int64_t dims) {
      Sizes sizes = c.sizes;
      sizes.dims = dims;
      std::vector<float> values = random.floats(sizes.elements());
      spoil_beyond(c.lengths, sizes, c.together, NAN, &values);
      return values;
    };
    q = rows(c.sizes.dims);
    k = rows(c.sizes.dims);
    v = rows(c.value_dims);
    d_out = rows(c.value_dims);
    const int64_t tables = c.by_head ? c.sizes.heads : 1;
    if (c.positions) position = random.floats(static_cast<size_t>(tables * (2 * c.positions - 1)));
    if (c.buckets) {
      time = random.floats(static_cast<size_t>(tables * c.buckets));
      int64_t edge = 1;
      for (int64_t n = 1; n < c.buckets; ++n, edge += 1 + edge / 3) edges.push_back(edge);
      times =
          random.integers<int64_t>(static_cast<size_t>(c.sizes.batch * c.sizes.rows), -5000, 5000);
      query_times = times;
      query_times[0] = INT64_MIN;  // further from others than int64 can hold
    }
  }
  std::vector<float> q, k, v, d_out, position, time;
  std::vector<int64_t> edges, times, query_times;
};

op::Result run_at(const Case& c, const Inputs& inputs, Place place, Results* to) {
  const Buffer<float> q(inputs.q, place), k(inputs.k, place), v(inputs.v, place),
      d_out(inputs.d_out, place), position(inputs.position, place), time(inputs.time, place);
  const Buffer<int64_t> edges(inputs.edges, place), times(inputs.times, place),
      query_times(inputs.query_times, place), lengths(c.lengths, place),
      starts(c.cu_seqlens, place), targets(c.targets, place);
  Buffer<float> out(v.size(), place), dq(q.size(), place), dk(k.size(), place), dv(v.size(), place);
  const auto heads = static_cast<size_t>(c.sizes.heads);
  Buffer<float> d_position(c.positions ? heads * (2 * c.positions - 1) : 0, place),
      d_time(heads * c.buckets, place);
  const auto view = [&](const Buffer<float>& buffer, int64_t dims) {
    Sizes sizes = c.sizes;
    sizes.dims = dims;
    const Strides at(sizes, c.together);
    return op::View{const_cast<float*>(buffer.data()), at.batch, at.head, at.row};
  };
  const auto given = [](const auto& buffer) { return buffer.size() ? buffer.data() : nullptr; };
  const int64_t batch = starts.size() ? static_cast<int64_t>(starts.size()) - 1 : c.sizes.batch;
  const op::Call call{
      {op::Dtype::f32, batch, c.sizes.heads, c.sizes.rows, c.sizes.dims, c.value_dims,
       given(lengths), given(starts), given(targets)},
      {given(position), c.by_head ? 2 * c.positions - 1 : 0, c.positions, given(time),
       c.by_head ? c.buckets : 0, c.buckets, edges.data(), times.data(), query_times.data()},
      1.0f / std::sqrt(static_cast<float>(c.sizes.dims)),
      1.0f / static_cast<float>(c.sizes.rows + 1),
      c.causal,
      view(q, c.sizes.dims),
      view(k, c.sizes.dims),
      view(v, c.value_dims),
      view(out, c.value_dims)};
  const op::Result result = op::forward(call);
  const op::Result again =
      op::backward(call, {view(d_out, c.value_dims), view(dq, c.sizes.dims), view(dk, c.sizes.dims),
                          view(dv, c.value_dims), c.positions ? d_position.data() : nullptr,
                          c.buckets ? d_time.data() : nullptr});
  CHECK(again == result);
  *to = {out.values(), dq.values(), dk.values(), dv.values(), d_position.values(), d_time.values()};
  return result;
}

// Every input lies in [-1, 1]: a score and its bias are below S = sqrt(D) + 2 and off by (D + 4) S
// roundings, which SiLU and its slope (both below S + 1, exp and a division off by 16 roundings)
// carry on; a sum over n rows, divided by n + 1, adds n roundings. Two twins: twice that, e.
// Outputs and dv sum weights, dq and dk slopes times |d_out| |v| <= Dv; a table's entry up to n^2
// of them.
void compare(const Case& c) {
  const Inputs inputs(c);
  Results expected;
  as_scalar([&] { CHECK(run_at(c, inputs, Place::heap, &expected).first == op::Bad::nothing); });
  const double dims = static_cast<double>(c.sizes.dims), n = static_cast<double>(c.sizes.rows);
  const double value_dims = static_cast<double>(c.value_dims);
  const double s = std::sqrt(dims) + 2;
  const double e = 2 * ((dims + value_dims + 20) * s + n) * (s + 1) * 0x1p-24;
  Results first;
  Isa isa = Isa::scalar;
  for_every_setting(
      text_of(c.sizes) + " Dv" + std::to_string(c.value_dims) + (c.causal ? " causal" : "") +
          (c.together ? " together" : "") + (c.lengths.empty() ? "" : " lengths") +
          (c.cu_seqlens.empty() ? "" : " jagged") + " P" + std::to_string(c.positions) +
          " buckets " + std::to_string(c.buckets),
      [&](Place place) {
        Results actual;
        CHECK(run_at(c, inputs, place, &actual).first == op::Bad::nothing);
        CHECK(worst_error(actual.out, expected.out, e, 0) <= 1);
        CHECK(worst_error(actual.dv, expected.dv, e, 0) <= 1);
        CHECK(worst_error(actual.dq, expected.dq, e * value_dims, 0) <= 1);
        CHECK(worst_error(actual.dk, expected.dk, e * value_dims, 0) <= 1);
        const double table = e * value_dims * (n + 1) * static_cast<double>(c.sizes.batch);
        CHECK(worst_error(actual.d_position, expected.d_position, table, 0) <= 1);
        CHECK(worst_error(actual.d_time, expected.d_time, table, 0) <= 1);
        // Neither the number of threads nor where the memory lies changes a bit.
        if (first.out.empty() || isa != active_isa()) {
          first = actual;
          isa = active_isa();
        }
        CHECK(actual == first);
      });
}

}  // namespace

TEST(pointwise_attention_rows) {
  for (const bool causal : {true, false})
    for (const int64_t rows : {1, 15, 16, 17, 31, 32, 33, 59, 60, 61, 64, 65, 93})
      compare({{1, 2, rows, 16},
               20,
               causal,
               rows % 2 == 1,
               rows % 3 == 0,
               rows % 4 * 20,
               rows % 5 * 7,
               {},
               {},
               {rows / 3}});
}

TEST(pointwise_attention_dims) {
  for (const int64_t dims : {1, 7, 15, 16, 17, 31, 32, 33, 48, 63, 64, 65, 80, 256}) {
    compare({{1, 2, 35, dims}, 5, true, dims % 2 == 0, false, 9, 12});
    compare({{1, 2, 35, 3}, dims, false, dims % 2 == 0});
  }
}

TEST(pointwise_attention_lengths) {
  for (const bool causal : {true, false})
    for (const bool together : {false, true})
      compare({{5, 2, 70, 20},
               12,
               causal,
               together,
               true,
               30,
               20,
               {0, 1, 16, 33, 70},
               {},
               {0, 1, 0, 20, 70}});
}

TEST(pointwise_attention_jagged) {
  compare({{1, 3, 101, 20}, 12, true, true, false, 200, 33, {}, {0, 0, 1, 34, 101}, {0, 1, 2, 60}});
}

TEST(pointwise_attention_names_what_is_out_of_order) {
  const auto result_of = [](const auto& change) {
    Case c{{2, 1, 9, 4}, 4};
    c.positions = 3;
    c.buckets = 4;
    Inputs inputs(c);
    change(c, inputs);
    Results ignored;
    return run_at(c, inputs, Place::before_guard, &ignored);
  };
  for (const int64_t bad : {int64_t{-1}, int64_t{10}, INT64_MAX, INT64_MIN}) {
    CHECK(result_of([&](Case& c, Inputs&) { c.lengths = {9, bad}; }) ==
          op::Result(op::Bad::lengths, 1));
    CHECK(result_of([&](Case& c, Inputs&) { c.targets = {bad, 0}; }) ==
          op::Result(op::Bad::targets, 0));
  }
  CHECK(result_of([](Case&, Inputs& inputs) { inputs.edges[1] = 0; }) ==
        op::Result(op::Bad::edges, 1));
  CHECK(result_of([](Case&, Inputs& inputs) { inputs.edges[2] = INT64_MAX; }) ==
        op::Result(op::Bad::edges, 2));
}

}  // namespace fastrec::tests
