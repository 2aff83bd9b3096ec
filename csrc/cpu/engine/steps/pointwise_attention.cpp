// pointwise_attention: HSTU's attention, sum_j silu(scale q[i] . k[j] + bias(i, j)) / norm * v[j].
//
// q and k [B, H, L, D], v [B, H, L, Dv] f32, rows contiguous, D and Dv <= 256; y f32
// [B, L, H, Dv] contiguous. position f32 [2 P - 1] or [H, 2 P - 1] and time f32 [buckets] or
// [H, buckets] are constants, and so are edges i64 [buckets - 1]. times and query_times i64 [B, L],
// lengths and targets i64 [B], contiguous.
#include "pointwise_attention/pointwise_attention.h"

#include "engine/check.h"
#include "engine/make_kind.h"

namespace fastrec::engine {
namespace {

namespace attention = pointwise_attention;

struct PointwiseAttention {
  static constexpr const char* name = "pointwise_attention";
  enum { q, k, v, position, time, edges, times, query_times, lengths, targets, y };
  static constexpr OperandRule operands[] = {
      {.name = "q", .strided = true},        {.name = "k", .strided = true},
      {.name = "v", .strided = true},        {.name = "position", .optional = true},
      {.name = "time", .optional = true},    {.name = "edges", .optional = true},
      {.name = "times", .optional = true},   {.name = "query_times", .optional = true},
      {.name = "lengths", .optional = true}, {.name = "targets", .optional = true},
      {.name = "y", .output = true}};
  struct Fields {
    double scale = 1;
    double norm = 0;  // 0: the number of rows
    bool causal = true;

    template <class V>
    void each(V& visit) {
      visit("scale", scale);
      visit("norm", norm);
      visit("causal", causal);
    }
  };
  static constexpr Traits traits = {.op = "pointwise_attention",
                                    .shown = "pointwise_attention",
                                    .users = Users::apart_of_two,
                                    .checked = {lengths, "lengths", k, 2}};

  static Rows rows(const Fields&) { return Rows::mixed; }
  static Isa isa(const Fields&, Tensors) { return attention::select().isa; }

  // Numbers of a constant table along its last dimension, one table for all heads or one a head.
  static int64_t table(const StepCheck& check, int operand, const Extent& heads) {
    require(check.is_constant(operand), "constant tables");
    check.dense(operand, {Dtype::f32});
    const Shape& sizes = check.sizes(operand);
    require(sizes.size() == 1 || (sizes.size() == 2 && sizes[0] == heads),
            "a table for all heads or one a head");
    const int64_t count = sizes.back().number().value_or(0);
    require(count > 0, "tables of a fixed size");
    return count;
  }

  static void check(const StepCheck& check, const Fields& fields) {
    require(fields.norm >= 0, "a norm of 0 or more");
    for (const int o : {q, k, v}) {
      require(check.sizes(o).size() == 4 && check.is(o, {Dtype::f32}), "4-D heads in f32");
      check.unit(o, 3, "contiguous heads");
    }
    const Shape &queries = check.sizes(q), &values = check.sizes(v);
    require(queries == check.sizes(k), "keys like the queries");
    require(values == Shape{queries[0], queries[1], queries[2], values[3]}, "a value for each key");
    for (const Extent& dims : {queries[3], values[3]}) {
      const int64_t width = dims.number().value_or(0);
      require(width > 0 && width <= attention::kMaxDims, "heads of 1 to 256");
    }
    require(queries[1].number().has_value(), "a fixed number of heads");
    check.dense(y, {Dtype::f32});
    check.elements(y, product({queries[0], queries[2], queries[1], values[3]}),
                   "a result of the values' size");
    if (check.has(position))
      require(table(check, position, queries[1]) % 2 == 1, "positions before and after");
    require(check.has(time) == check.has(edges) && check.has(time) == check.has(times),
            "time biases with their edges and times");
    require(check.has(times) || !check.has(query_times), "times of the keys");
    if (check.has(time)) {
      const int64_t buckets = table(check, time, queries[1]);
      require(buckets <= attention::kMaxBuckets, "at most 4,096 buckets");
      check.table(edges, Dtype::i64, {buckets - 1});
    }
    for (const int o : {times, query_times})
      if (check.has(o)) {
        check.dense(o, {Dtype::i64});
        require(check.sizes(o) == Shape{queries[0], queries[2]}, "a time a row");
      }
    for (const int o : {lengths, targets})
      if (check.has(o)) {
        check.dense(o, {Dtype::i64});
        require(check.sizes(o) == Shape{queries[0]}, "a number a sequence");
      }
  }

  static Status run(const Fields& fields, Tensors operands, const void*) {
    const int64_t* const sizes = operands[q].sizes;
    const int64_t batch = sizes[0], heads = sizes[1], rows = sizes[2];
    const int64_t width = operands[v].sizes[3];
    const auto view = [](const Tensor& t) {
      return attention::View{t.data, t.strides[0], t.strides[1], t.strides[2]};
    };
    // Of a table: its numbers, and how far the heads' own lie apart.
    const auto last = [](const Tensor& t) { return t.data ? t.sizes[t.dims - 1] : 0; };
    const auto apart = [&](const Tensor& t) { return t.dims == 2 ? last(t) : 0; };
    const Tensor &of_place = operands[position], &of_time = operands[time];
    attention::Call call{};
    call.shape = {attention::Dtype::f32,
                  batch,
                  heads,
                  rows,
                  sizes[3],
                  width,
                  operands[lengths].as<int64_t>(),
                  nullptr,
                  operands[targets].as<int64_t>()};
    call.bias = {of_place.as<float>(),
                 of_place.data ? apart(of_place) : 0,
                 (last(of_place) + 1) / 2,
                 of_time.as<float>(),
                 of_time.data ? apart(of_time) : 0,
                 last(of_time),
                 operands[edges].as<int64_t>(),
                 operands[times].as<int64_t>(),
                 operands[query_times].as<int64_t>()};
    call.scale = static_cast<float>(fields.scale);
    const double norm = fields.norm > 0 ? fields.norm : std::max<double>(rows, 1);
    call.inverse_norm = static_cast<float>(1.0 / norm);
    call.causal = fields.causal;
    call.q = view(operands[q]);
    call.k = view(operands[k]);
    call.v = view(operands[v]);
    call.out = {operands[y].data, rows * heads * width, width, heads * width};
    const auto [bad, entry] = attention::forward(call);
    if (bad == attention::Bad::nothing) return {};
    const int which = bad == attention::Bad::lengths   ? lengths
                      : bad == attention::Bad::targets ? targets
                                                       : edges;
    return {Fault::id_out_of_range, -1, operands[which].as<int64_t>()[entry], which};
  }

  // Scores of all pairs, or of those before each other.
  static void cost(const Fields& fields, Tensors operands, Cost& cost) {
    const int64_t* const sizes = operands[q].sizes;
    const int64_t pairs = fields.causal ? sizes[2] * (sizes[2] + 1) / 2 : sizes[2] * sizes[2];
    cost.macs = sizes[0] * sizes[1] * pairs * (sizes[3] + operands[v].sizes[3]);
    cost.peak = "fp32";
  }
};

}  // namespace

Kind pointwise_attention_kind() { return make_kind<PointwiseAttention>(); }

}  // namespace fastrec::engine
