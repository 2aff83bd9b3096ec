#include "pointwise_attention_int8/pointwise_attention_int8.h"

#include "attention_inputs.h"
#include "check.h"

namespace fastrec::tests {
namespace {

namespace op = pointwise_attention_int8;

struct Case {
  Sizes sizes;  // jagged: one batch of all rows
  int64_t value_dims;
  bool causal = true, together = false;
  int64_t positions = 0, buckets = 0;
  std::vector<int64_t> lengths = {}, cu_seqlens = {}, targets = {};
};

struct Inputs {
  explicit Inputs(const Case& c) {
    Random random(29);
    const auto rows = [&](int64_t dims) {
      return random.integers<int8_t>(static_cast<size_t>(c.sizes.rows_of_all() * dims), -128, 127);
    };
    q = rows(c.sizes.dims);
    k = rows(c.sizes.dims);
    v = rows(c.value_dims);
    if (c.positions) position = random.floats(static_cast<size_t>(2 * c.positions - 1));
    if (!c.buckets) return;
    time = random.floats(static_cast<size_t>(c.sizes.heads * c.buckets));
    int64_t edge = 1;
    for (int64_t n = 1; n < c.buckets; ++n, edge += 1 + edge / 3) edges.push_back(edge);
    times =
        random.integers<int64_t>(static_cast<size_t>(c.sizes.batch * c.sizes.rows), -5000, 5000);
  }
  std::vector<int8_t> q, k, v;
  std::vector<float> position, time;
  std::vector<int64_t> edges, times;
};

op::Result run_at(const Case& c, const Inputs& inputs, Place place, std::vector<float>* to) {
  const Buffer<int8_t> q(inputs.q, place), k(inputs.k, place), v(inputs.v, place);
  const Buffer<float> position(inputs.position, place), time(inputs.time, place);
  const Buffer<int64_t> edges(inputs.edges, place), times(inputs.times, place),
      lengths(c.lengths, place), starts(c.cu_seqlens, place), targets(c.targets, place);
  Buffer<float> out(v.size(), place);
  const auto view = [&](const void* data, int64_t dims) {
    Sizes sizes = c.sizes;
    sizes.dims = dims;
    const Strides at(sizes, c.together);
    return op::View{const_cast<void*>(data), at.batch, at.head, at.row};
  };
  const auto given = [](const auto& buffer) { return buffer.size() ? buffer.data() : nullptr; };
  const int64_t batch = starts.size() ? static_cast<int64_t>(starts.size()) - 1 : c.sizes.batch;
  const op::Result result =
      op::forward({{pointwise_attention::Dtype::f32, batch, c.sizes.heads, c.sizes.rows,
                    c.sizes.dims, c.value_dims, given(lengths), given(starts), given(targets)},
                   {given(position), 0, c.positions, given(time), c.buckets, c.buckets,
                    edges.data(), times.data(), times.data()},
                   1e-4f,
                   1e-2f,
                   c.causal,
                   view(q.data(), c.sizes.dims),
                   view(k.data(), c.sizes.dims),
                   view(v.data(), c.value_dims),
                   view(out.data(), c.value_dims)});
  *to = out.values();
  return result;
}

// To the last bit.
void compare(const Case& c) {
  const Inputs inputs(c);
  std::vector<float> expected;
  as_scalar([&] { CHECK(run_at(c, inputs, Place::heap, &expected).first == op::Bad::nothing); });
  for_every_setting(text_of(c.sizes) + " Dv" + std::to_string(c.value_dims) +
                        (c.causal ? " causal" : "") + (c.together ? " together" : "") +
                        (c.lengths.empty() ? "" : " lengths") +
                        (c.cu_seqlens.empty() ? "" : " jagged"),
                    [&](Place place) {
                      std::vector<float> actual;
                      CHECK(run_at(c, inputs, place, &actual).first == op::Bad::nothing);
                      CHECK(actual == expected);
                    });
}

}  // namespace

TEST(pointwise_attention_int8_rows) {
  for (const bool causal : {true, false})
    for (const int64_t rows : {1, 15, 16, 17, 31, 32, 33, 63, 64, 65, 93, 130})
      compare({{1, 2, rows, 16},
               20,
               causal,
               rows % 2 == 1,
               rows % 4 * 20,
               rows % 5 * 7,
               {},
               {},
               {rows / 3}});
}

TEST(pointwise_attention_int8_dims) {
  for (const int64_t dims : {1, 2, 3, 4, 5, 7, 8, 9, 31, 32, 33, 64, 256}) {
    compare({{1, 2, 35, dims}, 5, true, dims % 2 == 0, 9, 12});
    compare({{1, 2, 35, 3}, dims, false, dims % 2 == 0});
  }
}

TEST(pointwise_attention_int8_sequences) {
  for (const bool causal : {true, false}) {
    compare(
        {{5, 2, 70, 20}, 12, causal, causal, 30, 20, {0, 1, 16, 33, 70}, {}, {0, 1, 0, 20, 70}});
    compare({{1, 3, 101, 20}, 12, causal, true, 200, 33, {}, {0, 0, 1, 34, 101}, {0, 1, 2, 60}});
  }
}

}  // namespace fastrec::tests
