#include "engine_samples.h"

namespace fastrec::tests {
namespace {

using Maker = SampleMaker;
using json::List;

Sample argsort() {
  Maker m;
  return m.with("argsort", {m.input(Dtype::f32, {B, 9}), m.arena(Dtype::i64, {B, 4})},
                {{"descending", true}});
}

Sample attention() {
  Maker m;
  return m.with("attention",
                {m.heads(), m.heads(), m.heads(), m.input(Dtype::i64, {B}),
                 m.arena(Dtype::f32, {B, L, 2, 4})},
                {{"scale", 0.5}});
}

Sample causal_attention() {
  Maker m;
  return m.with("causal_attention",
                {m.heads(), m.heads(), m.heads(), m.arena(Dtype::f32, {B, L, 8})},
                {{"scale", 0.5}});
}

Sample masked_attention(bool causal, bool caps) {
  Maker m;
  View mask = m.input(Dtype::f32, {B, L});
  mask.sizes = {B, 2, L, L};
  mask.strides = {L, 0, 0, 1};
  return m.with("masked_attention",
                {m.heads(), m.heads(), m.heads(), mask, m.arena(Dtype::f32, {B, L, 2, 4})},
                {{"scale", 0.5}, {"causal", causal}, {"caps", caps}, {"empty_is_nan", false}});
}

Sample cumsum() {
  Maker m;
  return m.with("cumsum", {m.input(Dtype::i64, {B, L, 3}), m.arena(Dtype::i64, {B, L, 3})});
}

Sample gather(bool quantised) {
  Maker m;
  const View ids = m.input(Dtype::i64, {B, L});
  if (!quantised)
    return m.with("gather", {ids, m.floats({7, 5}), kNone, m.arena(Dtype::f32, {B, L, 5})});
  const View table = m.constant(Dtype::s8, {7, 5}, m.random().integers<int8_t>(35, -128, 127));
  return m.with("gather", {ids, table, m.floats({7}), m.arena(Dtype::f32, {B, L, 5})});
}

Sample grouped_linear() {
  Maker m;
  return m.with("grouped_linear",
                {m.input(Dtype::f32, {B, L, 6}), m.floats({2, 5, 3}), m.floats({10}),
                 m.arena(Dtype::f32, {B, L, 10})},
                {{"shuffle", true}});
}

Sample layer_norm(bool tiles) {
  Maker m;
  View y = m.arena(Dtype::u8, {B, L, tiles ? 64 : 9});
  y.sizes = {B, L, 9};
  y.strides = contiguous_strides(y.sizes);
  return m.with("layer_norm",
                {m.input(Dtype::f32, {B, L, 9}), m.input(Dtype::f32, {B, L, 9}), m.floats({9}),
                 m.floats({9}), m.arena(Dtype::f32, {B, L, 9}), y},
                {{"eps", 1e-5}, {"y_scale", 0.1}, {"y_zero_point", 9}, {"y_tiles", tiles}});
}

Sample linear(const char* kind, int64_t outputs) {
  Maker m;
  return m.with(kind,
                {m.input(Dtype::f32, {B, L, 7}), m.floats({outputs, 7}), m.floats({outputs}),
                 m.arena(Dtype::f32, {B, L, outputs})},
                {{"activation", "gelu"}});
}

Sample linear_int8(bool tiles) {
  Maker m;
  View x = m.arena(Dtype::u8, {B, L, 64}), y = m.arena(Dtype::u8, {B, L, tiles ? 128 : 35});
  x.sizes = {B, L, 9};
  y.sizes = {B, L, 35};
  for (View* view : {&x, &y}) view->strides = contiguous_strides(view->sizes);
  const View rows = tiles ? x : m.input(Dtype::u8, {B, L, 9});
  const View values = m.constant(Dtype::s8, {4, 128}, m.random().integers<int8_t>(512, -9, 9));
  const View index = m.constant<int32_t>(Dtype::i32, {4}, {0, 2, 1, 2});
  const View start = m.constant<int32_t>(Dtype::i32, {3}, {0, 2, 4});
  const View sums = m.constant(Dtype::i32, {35}, m.random().integers<int32_t>(35, -99, 99));
  if (tiles) {
    const View in = m.input(Dtype::f32, {B, L, 9});
    m.before("layer_norm", {in, kNone, m.floats({9}), m.floats({9}), kNone, x},
             {{"eps", 1e-5}, {"y_scale", 0.1}, {"y_zero_point", 9}, {"y_tiles", true}});
  }
  return m.with("linear_int8",
                {rows, values, index, start, m.floats({35}), sums, m.floats({35}), y},
                {{"outputs", 35},
                 {"inputs", 9},
                 {"x_scale", 0.1},
                 {"x_zero_point", 9},
                 {"activation", "relu"},
                 {"y_scale", 0.2},
                 {"y_zero_point", 3},
                 {"x_tiles", tiles},
                 {"y_tiles", tiles}});
}

Sample map() {
  Maker m;
  View x = m.input(Dtype::f32, {B, 3});
  x.sizes = {B, L, 3};
  x.strides = {3, 0, 1};
  return m.with("map", {x, m.input(Dtype::f32, {B, L, 3}), m.arena(Dtype::f32, {B, L, 3})},
                {{"program", json::parse(R"([["add_f32", 0, 1], ["index", 1], ["to_f32", 3],
                                             ["number", "-inf"], ["integer", 3], ["to_f32", 6],
                                             ["where_f32", 3, 2, 7], ["mul_f32", 8, 4]])")}});
}

Sample matmul(bool transposed) {
  Maker m;
  View b = m.input(Dtype::f32, {B, 6, 4});
  b.sizes = transposed ? Shape{B, 4, 6} : Shape{B, 6, 4};
  if (transposed) b.strides = {24, 1, 4};
  const View a = m.input(Dtype::f32, {B, L, transposed ? 4 : 6});
  return m.with("matmul", {a, b, m.arena(Dtype::f32, {B, L, transposed ? 6 : 4})},
                {{"transposed", transposed}});
}

Sample quantize() {
  Maker m;
  return m.with("quantize", {m.input(Dtype::f32, {B, L, 5}), m.arena(Dtype::u8, {B, L, 5})},
                {{"scale", 0.1}, {"zero_point", 7}});
}

Sample recurrent(const char* cell, int64_t gates, int64_t states) {
  Maker m;
  const int64_t size = 5;
  return m.with("recurrent",
                {m.input(Dtype::f32, {B, L, gates * size}), m.floats({gates * size, size}),
                 m.floats({gates * size}), m.input(Dtype::f32, {B, states * size}),
                 m.input(Dtype::i64, {B}), m.arena(Dtype::f32, {B, L, states * size})},
                {{"cell", cell}, {"backwards", gates == 3}});
}

Sample reduce(const char* operation) {
  Maker m;
  return m.with("reduce", {m.input(Dtype::f32, {B, L, 5}), m.arena(Dtype::f32, {B, 5})},
                {{"operation", operation}});
}

Sample pointwise_attention(bool tables) {
  Maker m;
  const View times = m.input(Dtype::i64, {B, L}), lengths = m.input(Dtype::i64, {B});
  const View y = m.arena(Dtype::f32, {B, L, 2, 4});
  if (!tables)
    return m.with(
        "pointwise_attention",
        {m.heads(), m.heads(), m.heads(), kNone, kNone, kNone, kNone, kNone, lengths, kNone, y},
        {{"scale", 0.5}, {"norm", 0}, {"causal", true}});
  const View edges = m.constant<int64_t>(Dtype::i64, {2}, {1, 5});
  return m.with("pointwise_attention",
                {m.heads(), m.heads(), m.heads(), m.floats({2, 7}), m.floats({3}), edges, times,
                 times, lengths, m.input(Dtype::i64, {B}), y},
                {{"scale", 0.5}, {"norm", 9.0}, {"causal", false}});
}

Sample resumed_attention(bool has_pattern) {
  Maker m;
  return m.with("resumed_attention",
                {m.heads(), m.heads(), m.heads(), m.heads(), m.heads(), m.input(Dtype::i64, {B}),
                 m.arena(Dtype::f32, {B, L, 2, 4})},
                {{"scale", 0.5},
                 {"has_pattern", has_pattern},
                 {"window", 1},
                 {"distances", List{List{2, 4}}}});
}

Sample scatter(bool adds) {
  Maker m;
  const View index = m.constant<int64_t>(Dtype::i64, {1, 4, 1}, {0, 2, -1, 2});
  return m.with("scatter",
                {m.input(Dtype::f32, {B, 5, 3}), index, m.input(Dtype::f32, {B, 4, 3}),
                 m.arena(Dtype::f32, {B, 5, 3})},
                {{"adds", adds}});
}

Sample separable_projection() {
  Maker m;
  return m.with("separable_projection",
                {m.input(Dtype::f32, {B, L, 6}), m.floats({6, 3}), m.floats({2, 5, 3}),
                 m.floats({10}), m.input(Dtype::i64, {B}), m.arena(Dtype::f32, {B, L, 10})},
                {{"before", 1}});
}

Sample softmax() {
  Maker m;
  return m.with("softmax", {m.input(Dtype::f32, {B, L, 5}), m.arena(Dtype::f32, {B, L, 5})});
}

Sample take(bool rows) {
  Maker m;
  const Extent columns(rows ? 1 : 3);
  return m.with("take", {m.input(Dtype::f32, {B, 5, 3}), m.input(Dtype::i64, {B, L, columns}),
                         m.arena(Dtype::f32, {B, L, 3})});
}

// Windows of three positions, one apart.
Sample window_linear() {
  Maker m;
  View x = m.input(Dtype::f32, {B, 9, 16});
  x.sizes = {B, 7, 3, 16};
  x.strides = {9 * 16, 16, 16, 1};
  return m.with("window_linear",
                {x, m.floats({33, 48}), m.floats({33}), m.arena(Dtype::f32, {B, 7, 33})},
                {{"activation", "relu"}});
}

Sample window_sparse_attention(bool causal) {
  Maker m;
  return m.with(
      "window_sparse_attention",
      {m.heads(), m.heads(), m.heads(), m.input(Dtype::i64, {B}),
       m.arena(Dtype::f32, {B, L, 2, 4})},
      {{"scale", 0.5}, {"causal", causal}, {"window", 1}, {"distances", List{List{2, 4}, List{}}}});
}

Sample window_sparse_attention_int8(bool everything) {
  Maker m;
  return m.with("window_sparse_attention_int8",
                {m.heads(Dtype::u8), m.heads(Dtype::u8), m.heads(Dtype::u8),
                 m.input(Dtype::i64, {B}), m.arena(Dtype::u8, {B, L, 2, 4})},
                {{"exponent_scale", 1e-3},
                 {"v_scale", 0.1},
                 {"y_scale", 0.1},
                 {"q_zero_point", 128},
                 {"y_zero_point", 100},
                 {"causal", false},
                 {"window", everything ? 1 << 30 : 2},
                 {"distances", everything ? List{List{}} : List{List{3}, List{4, 9}}}});
}

}  // namespace

std::vector<std::pair<std::string, Sample>> samples() {
  std::vector<std::pair<std::string, Sample>> all;
  const auto add = [&](const char* kind, const Sample& sample) { all.emplace_back(kind, sample); };
  add("argsort", argsort());
  add("attention", attention());
  add("causal_attention", causal_attention());
  add("cumsum", cumsum());
  for (const bool quantised : {false, true}) add("gather", gather(quantised));
  add("grouped_linear", grouped_linear());
  for (const bool tiles : {false, true}) add("layer_norm", layer_norm(tiles));
  for (const int64_t outputs : {2, 33}) add("linear", linear("linear", outputs));
  add("linear_bf16", linear("linear_bf16", 33));
  for (const bool tiles : {false, true}) add("linear_int8", linear_int8(tiles));
  add("map", map());
  add("masked_attention", masked_attention(false, false));
  add("masked_attention", masked_attention(true, false));
  add("masked_attention", masked_attention(false, true));
  for (const bool transposed : {false, true}) add("matmul", matmul(transposed));
  for (const bool tables : {false, true}) add("pointwise_attention", pointwise_attention(tables));
  add("quantize", quantize());
  add("recurrent", recurrent("gru", 3, 1));
  add("recurrent", recurrent("lstm", 4, 2));
  for (const char* cell : {"tanh", "relu"}) add("recurrent", recurrent(cell, 1, 1));
  for (const char* operation : {"sum", "mean", "max", "min"}) add("reduce", reduce(operation));
  for (const bool pattern : {false, true}) add("resumed_attention", resumed_attention(pattern));
  for (const bool adds : {false, true}) add("scatter", scatter(adds));
  add("separable_projection", separable_projection());
  add("softmax", softmax());
  for (const bool rows : {false, true}) add("take", take(rows));
  add("window_linear", window_linear());
  for (const bool causal : {false, true})
    add("window_sparse_attention", window_sparse_attention(causal));
  for (const bool everything : {false, true})
    add("window_sparse_attention_int8", window_sparse_attention_int8(everything));
  return all;
}

}  // namespace fastrec::tests
