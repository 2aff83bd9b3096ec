// The steps of plans, each alone on operands that begin or end at a guard page.
#include <algorithm>
#include <cmath>
#include <limits>

#include "element.h"
#include "engine_plans.h"

namespace fastrec::tests {
namespace {

constexpr float kInfinity = std::numeric_limits<float>::infinity();

std::string named(const char* kind, const std::vector<int64_t>& sizes) {
  std::string name = kind;
  for (const int64_t size : sizes) name += " " + std::to_string(size);
  return name;
}

bool same(float a, float b) { return a == b || (std::isnan(a) && std::isnan(b)); }

struct Heads {
  int64_t batch, heads, queries, keys, dims;
  int64_t count(int64_t rows) const { return batch * heads * rows * dims; }
};

enum class Masking { none, whole, of_keys, hides_all };

// softmax(scale q k^T + mask) v in float64, [B, Lq, H, D]; rows that see nothing are `nothing`. The
// mask is [B, H, Lq, Lk] by strides, and the scores' upper bound where it `caps`.
std::vector<float> attended(const Heads& s, const float* q, const float* k, const float* v,
                            const float* mask, const std::vector<int64_t>& mask_strides,
                            bool causal, double scale, bool caps = false, float nothing = 0) {
  std::vector<float> out(static_cast<size_t>(s.count(s.queries)), nothing);
  for (int64_t b = 0; b < s.batch; ++b)
    for (int64_t h = 0; h < s.heads; ++h)
      for (int64_t i = 0; i < s.queries; ++i) {
        const float* query = q + ((b * s.heads + h) * s.queries + i) * s.dims;
        const int64_t head = (b * s.heads + h) * s.keys * s.dims;
        std::vector<double> score(static_cast<size_t>(s.keys));
        double top = -kInfinity, sum = 0;
        for (int64_t j = 0; j < s.keys; ++j) {
          double dot = 0;
          for (int64_t d = 0; d < s.dims; ++d)
            dot += static_cast<double>(query[d]) * k[head + j * s.dims + d];
          score[j] = dot * scale;
          if (mask) {
            const double masking = mask[b * mask_strides[0] + h * mask_strides[1] +
                                        i * mask_strides[2] + j * mask_strides[3]];
            score[j] = caps ? std::min(score[j], masking) : score[j] + masking;
          }
          if (causal && j > i) score[j] = -kInfinity;
          top = std::max(top, score[j]);
        }
        if (top == -kInfinity) continue;
        for (double& value : score) sum += value = std::exp(value - top);
        for (int64_t d = 0; d < s.dims; ++d) {
          double total = 0;
          for (int64_t j = 0; j < s.keys; ++j) total += score[j] * v[head + j * s.dims + d];
          out[((b * s.queries + i) * s.heads + h) * s.dims + d] = static_cast<float>(total / sum);
        }
      }
  return out;
}

// Values lie within 1; a sum of some hundred products, softmax and a mean of the values are off by
// less than 1e-5, and any wrong key, row or head by far more.
constexpr double kAttentionError = 1e-5;

void compare_masked(const Heads& s, Masking masking, bool causal, bool caps, bool nans) {
  Random random(11);
  const auto q = random.floats(s.count(s.queries)), k = random.floats(s.count(s.keys)),
             v = random.floats(s.count(s.keys));
  std::vector<float> mask;
  std::vector<int64_t> strides;
  if (masking == Masking::whole) {
    mask = random.floats(s.batch * s.heads * s.queries * s.keys);
    for (size_t i = 0; i < mask.size(); i += 3) mask[i] = -kInfinity;
    strides = {s.heads * s.queries * s.keys, s.queries * s.keys, s.keys, 1};
  } else if (masking != Masking::none) {
    mask.assign(static_cast<size_t>(s.batch * s.keys), 0.0f);
    for (int64_t b = 0; b < s.batch; ++b)
      for (int64_t j = 0; j < s.keys; ++j)
        if (masking == Masking::hides_all || (b % 2 ? j < b : j >= s.keys - b))
          mask[b * s.keys + j] = -kInfinity;
    strides = {s.keys, 0, 0, 1};
  }
  const bool has_mask = masking != Masking::none;
  const double scale = 1 / std::sqrt(static_cast<double>(s.dims));
  const auto expected = attended(s, q.data(), k.data(), v.data(), has_mask ? mask.data() : nullptr,
                                 strides, causal, scale, caps, nans ? NAN : 0.0f);
  for_every_setting(
      named("masked_attention",
            {s.batch, s.heads, s.queries, s.keys, s.dims, static_cast<int>(masking)}),
      [&](Place place) {
        const Buffer<float> qs(q, place), ks(k, place), vs(v, place), ms(mask, place);
        Buffer<float> out(expected.size(), place);
        const std::vector<int64_t> rows = {s.batch, s.heads, s.keys, s.dims};
        std::vector<Tensor> operands = {
            tensor(qs.data(), Dtype::f32, {s.batch, s.heads, s.queries, s.dims}),
            tensor(ks.data(), Dtype::f32, rows), tensor(vs.data(), Dtype::f32, rows)};
        operands.push_back(
            has_mask ? tensor(ms.data(), Dtype::f32, {s.batch, s.heads, s.queries, s.keys}, strides)
                     : kAbsent);
        operands.push_back(tensor(out.data(), Dtype::f32, {s.batch, s.queries, s.heads, s.dims}));
        CHECK(
            run_step("masked_attention", operands,
                     {{"scale", scale}, {"causal", causal}, {"caps", caps}, {"empty_is_nan", nans}})
                .fault == Fault::none);
        for (size_t i = 0; i < expected.size(); ++i)
          CHECK(same(out.data()[i], expected[i]) ||
                std::abs(out.data()[i] - expected[i]) <= kAttentionError);
      });
}

void compare_causal(const Heads& s) {
  Random random(13);
  const auto q = random.floats(s.count(s.keys)), k = random.floats(s.count(s.keys)),
             v = random.floats(s.count(s.keys));
  const auto expected = attended(s, q.data(), k.data(), v.data(), nullptr, {}, true, 0.5);
  for_every_setting(
      named("causal_attention", {s.batch, s.heads, s.keys, s.dims}), [&](Place place) {
        const Buffer<float> qs(q, place), ks(k, place), vs(v, place);
        Buffer<float> out(expected.size(), place);
        const std::vector<int64_t> rows = {s.batch, s.heads, s.keys, s.dims};
        CHECK(run_step("causal_attention",
                       {tensor(qs.data(), Dtype::f32, rows), tensor(ks.data(), Dtype::f32, rows),
                        tensor(vs.data(), Dtype::f32, rows),
                        tensor(out.data(), Dtype::f32, {s.batch, s.keys, s.heads, s.dims})},
                       {{"scale", 0.5}})
                  .fault == Fault::none);
        CHECK(worst_error(out.values(), expected, kAttentionError, 0) <= 1);
      });
}

// The last `now` of s.keys positions as new events, the others as the past in a buffer with room.
// Without distances they see all.
void compare_resumed(const Heads& s, int64_t now, int64_t window,
                     const std::vector<int64_t>& distances) {
  Random random(23);
  const int64_t past = s.keys - now, room = past + 2;
  const auto q = random.floats(s.count(s.keys)), k = random.floats(s.count(s.keys)),
             v = random.floats(s.count(s.keys));
  // Keys that the pattern hides are masked.
  std::vector<float> mask(s.keys * s.keys, 0.0f);
  if (!distances.empty())
    for (int64_t i = 0; i < s.keys; ++i)
      for (int64_t j = 0; j <= i; ++j) {
        const bool far = std::find(distances.begin(), distances.end(), i - j) != distances.end();
        if (i - j > window && !far) mask[i * s.keys + j] = -kInfinity;
      }
  const auto expected =
      attended(s, q.data(), k.data(), v.data(), mask.data(), {0, 0, s.keys, 1}, true, 0.5);
  const int64_t heads = s.batch * s.heads;
  const auto rows = [&](const std::vector<float>& from, int64_t first, int64_t count,
                        int64_t padded) {
    std::vector<float> part(heads * padded * s.dims, NAN);  // what is no row of the past
    for (int64_t h = 0; h < heads; ++h)
      std::copy_n(from.begin() + (h * s.keys + first) * s.dims, count * s.dims,
                  part.begin() + h * padded * s.dims);
    return part;
  };
  std::vector<float> wanted;
  for (int64_t b = 0; b < s.batch; ++b)
    wanted.insert(wanted.end(), expected.begin() + (b * s.keys + past) * s.heads * s.dims,
                  expected.begin() + (b + 1) * s.keys * s.heads * s.dims);
  const json::List lists{json::List(distances.begin(), distances.end())};
  for_every_setting(
      named("resumed_attention", {s.batch, s.heads, past, now, s.dims}), [&](Place place) {
        const Buffer<float> qs(rows(q, past, now, now), place), ks(rows(k, past, now, now), place),
            vs(rows(v, past, now, now), place);
        const Buffer<float> old_k(rows(k, 0, past, room), place),
            old_v(rows(v, 0, past, room), place);
        const Buffer<int64_t> lengths(std::vector<int64_t>(s.batch, past), place);
        Buffer<float> out(wanted.size(), place);
        const std::vector<int64_t> fresh = {s.batch, s.heads, now, s.dims},
                                   kept = {s.batch, s.heads, room, s.dims};
        CHECK(
            run_step("resumed_attention",
                     {tensor(qs.data(), Dtype::f32, fresh), tensor(ks.data(), Dtype::f32, fresh),
                      tensor(vs.data(), Dtype::f32, fresh), tensor(old_k.data(), Dtype::f32, kept),
                      tensor(old_v.data(), Dtype::f32, kept),
                      tensor(lengths.data(), Dtype::i64, {s.batch}),
                      tensor(out.data(), Dtype::f32, {s.batch, now, s.heads, s.dims})},
                     {{"scale", 0.5},
                      {"has_pattern", !distances.empty()},
                      {"window", window},
                      {"distances", lists}})
                .fault == Fault::none);
        CHECK(worst_error(out.values(), wanted, kAttentionError, 0) <= 1);
      });
}

void compare_reduce(const std::vector<int64_t>& sizes, const std::string& operation) {
  const bool maximum = operation == "max";
  const int64_t outer = sizes[0], count = sizes[1], width = sizes[2];
  auto x = Random(17).floats(outer * count * width);
  for (size_t i = 7; i < x.size(); i += 211) x[i] = NAN;
  std::vector<float> expected;
  for (int64_t a = 0; a < outer; ++a)
    for (int64_t c = 0; c < width; ++c) {
      double total = maximum ? -kInfinity : 0.0;
      for (int64_t n = 0; n < count; ++n) {
        const float value = x[(a * count + n) * width + c];
        if (!maximum)
          total += value;
        else if (std::isnan(value) || value > total)
          total = value;
      }
      expected.push_back(
          static_cast<float>(operation == "mean" ? total / static_cast<double>(count) : total));
    }
  for_every_setting(named("reduce", sizes), [&](Place place) {
    const Buffer<float> in(x, place);
    Buffer<float> out(expected.size(), place);
    CHECK(run_step("reduce",
                   {tensor(in.data(), Dtype::f32, sizes),
                    tensor(out.data(), Dtype::f32, {outer, width})},
                   {{"operation", operation}})
              .fault == Fault::none);
    // Doubles that are added in another order, rounded once.
    for (size_t i = 0; i < expected.size(); ++i)
      CHECK(same(out.data()[i], expected[i]) ||
            std::abs(out.data()[i] - expected[i]) <= 0x1p-23 * std::abs(expected[i]));
  });
}

void compare_integers(const std::vector<int64_t>& sizes) {
  const int64_t outer = sizes[0], count = sizes[1], width = sizes[2];
  auto x = Random(53).integers<int64_t>(outer * count * width, -9, 9);
  for (size_t i = 3; i < x.size(); i += 97) x[i] = i % 2 ? INT64_MAX : INT64_MIN;  // sums wrap
  std::vector<int64_t> sums, tops, running(x.size());
  for (int64_t a = 0; a < outer; ++a)
    for (int64_t c = 0; c < width; ++c) {
      uint64_t sum = 0;
      int64_t top = INT64_MIN;
      for (int64_t n = 0; n < count; ++n) {
        const int64_t at = (a * count + n) * width + c;
        top = std::max(top, x[at]);
        running[at] = static_cast<int64_t>(sum += static_cast<uint64_t>(x[at]));
      }
      sums.push_back(static_cast<int64_t>(sum));
      tops.push_back(top);
    }
  for_every_setting(named("integers", sizes), [&](Place place) {
    const Buffer<int64_t> in(x, place);
    Buffer<int64_t> sum(sums.size(), place), top(tops.size(), place), all(x.size(), place);
    const Tensor from = tensor(in.data(), Dtype::i64, sizes);
    const auto result = [&](Buffer<int64_t>& to) {
      return tensor(to.data(), Dtype::i64, {outer, width});
    };
    CHECK(run_step("reduce", {from, result(sum)}, {{"operation", "sum"}}).fault == Fault::none);
    CHECK(run_step("reduce", {from, result(top)}, {{"operation", "max"}}).fault == Fault::none);
    CHECK(run_step("cumsum", {from, tensor(all.data(), Dtype::i64, sizes)}).fault == Fault::none);
    CHECK(sum.values() == sums && top.values() == tops && all.values() == running);
  });
}

// a [2, 3, M, K] in order, b [3, K, N] for both (or [3, N, K]).
void compare_matmul(int64_t m, int64_t k, int64_t n, bool columns) {
  Random random(59);
  const auto a = random.floats(6 * m * k), b = random.floats(3 * k * n);
  std::vector<float> expected;
  for (int64_t matrix = 0; matrix < 6; ++matrix)
    for (int64_t r = 0; r < m; ++r)
      for (int64_t c = 0; c < n; ++c) {
        double sum = 0;
        for (int64_t i = 0; i < k; ++i)
          sum += static_cast<double>(a[(matrix * m + r) * k + i]) *
                 b[matrix % 3 * k * n + (columns ? c * k + i : i * n + c)];
        expected.push_back(static_cast<float>(sum));
      }
  for_every_setting(named("matmul", {m, k, n, columns}), [&](Place place) {
    const Buffer<float> as(a, place), bs(b, place);
    Buffer<float> out(expected.size(), place);
    const Tensor right =
        tensor(bs.data(), Dtype::f32, {2, 3, k, n}, {0, k * n, columns ? 1 : n, columns ? k : 1});
    CHECK(run_step("matmul",
                   {tensor(as.data(), Dtype::f32, {2, 3, m, k}), right,
                    tensor(out.data(), Dtype::f32, {2, 3, m, n})},
                   {{"transposed", columns}})
              .fault == Fault::none);
    const double bound = 1e-5 + static_cast<double>(k) * 0x1p-24;
    CHECK(worst_error(out.values(), expected, bound, 1e-6) <= 1);
  });
}

struct Given {
  std::vector<int64_t> sizes;
  std::vector<float> floats;
  std::vector<int64_t> integers;  // instead of floats
};

// A step on inputs in order, against itself on the scalar kernels: sums of some hundred products of
// values within 1.
void compare_with_scalar(const char* kind, const std::vector<Given>& inputs,
                         const std::vector<int64_t>& result, const json::Object& fields) {
  int64_t count = 1;
  for (const int64_t size : result) count *= size;
  const auto run_at = [&](Place place) {
    std::vector<std::unique_ptr<Buffer<float>>> floats;
    std::vector<std::unique_ptr<Buffer<int64_t>>> ids;
    std::vector<Tensor> operands;
    for (const Given& given : inputs)
      if (given.integers.empty()) {
        floats.push_back(std::make_unique<Buffer<float>>(given.floats, place));
        operands.push_back(tensor(floats.back()->data(), Dtype::f32, given.sizes));
      } else {
        ids.push_back(std::make_unique<Buffer<int64_t>>(given.integers, place));
        operands.push_back(tensor(ids.back()->data(), Dtype::i64, given.sizes));
      }
    Buffer<float> out(static_cast<size_t>(count), place);
    operands.push_back(tensor(out.data(), Dtype::f32, result));
    CHECK(run_step(kind, operands, fields).fault == Fault::none);
    return out.values();
  };
  std::vector<float> expected;
  as_scalar([&] { expected = run_at(Place::heap); });
  for_every_setting(named(kind, result), [&](Place place) {
    CHECK(worst_error(run_at(place), expected, 1e-4, 1e-4) <= 1);
  });
}

void compare_softmax(int64_t rows, int64_t width) {
  auto x = Random(19).floats(rows * width, 20.0f);
  if (rows > 2) x[2 * width] = NAN;
  std::vector<float> expected;
  for (int64_t r = 0; r < rows; ++r) {
    const float* row = x.data() + r * width;
    double top = -kInfinity, sum = 0;
    for (int64_t i = 0; i < width; ++i) top = std::max<double>(top, row[i]);
    for (int64_t i = 0; i < width; ++i) sum += std::exp(row[i] - top);
    for (int64_t i = 0; i < width; ++i)
      expected.push_back(static_cast<float>(std::exp(row[i] - top) / sum));
  }
  for_every_setting(named("softmax", {rows, width}), [&](Place place) {
    const Buffer<float> in(x, place);
    Buffer<float> out(x.size(), place);
    CHECK(run_step("softmax", {tensor(in.data(), Dtype::f32, {rows, width}),
                               tensor(out.data(), Dtype::f32, {rows, width})})
              .fault == Fault::none);
    // exp of a difference up to 40 that is rounded (40 * 2^-24), and a sum of `width` terms.
    const double bound = (45 + static_cast<double>(width)) * 0x1p-24;
    for (int64_t r = 0; r < rows; ++r)
      for (int64_t i = r * width; i < (r + 1) * width; ++i)
        if (r == 2)
          CHECK(std::isnan(out.data()[i]));
        else
          CHECK(std::abs(out.data()[i] - expected[i]) <= bound * expected[i] + 1e-30);
  });
}

constexpr const char* kActivations[] = {"none", "relu", "gelu"};

void compare_linear(int64_t rows, int64_t outputs, int64_t inputs, bool bias, int64_t activation) {
  Random random(23);
  const auto x = random.floats(rows * inputs), w = random.floats(outputs * inputs),
             b = random.floats(outputs);
  std::vector<float> expected;
  for (int64_t r = 0; r < rows; ++r)
    for (int64_t n = 0; n < outputs; ++n) {
      double sum = bias ? b[n] : 0.0;
      for (int64_t i = 0; i < inputs; ++i)
        sum += static_cast<double>(x[r * inputs + i]) * w[n * inputs + i];
      if (activation == 1) sum = std::max(sum, 0.0);
      if (activation == 2) sum = 0.5 * sum * (1 + std::erf(sum / std::sqrt(2.0)));
      expected.push_back(static_cast<float>(sum));
    }
  for_every_setting(named("linear", {rows, outputs, inputs, bias, activation}), [&](Place place) {
    const Buffer<float> xs(x, place), ws(w, place), bs(b, place);
    Buffer<float> out(expected.size(), place);
    std::vector<Tensor> operands = {tensor(xs.data(), Dtype::f32, {rows, inputs}),
                                    tensor(ws.data(), Dtype::f32, {outputs, inputs})};
    operands.push_back(bias ? tensor(bs.data(), Dtype::f32, {outputs}) : kAbsent);
    operands.push_back(tensor(out.data(), Dtype::f32, {rows, outputs}));
    CHECK(run_step("linear", operands, {{"activation", kActivations[activation]}}).fault ==
          Fault::none);
    // Products within 1 added in any order: K units of 2^-24 of partial sums up to K, on average
    // far less; gelu's erf is off by 4.3e-7 of the sum.
    const double bound = 1e-5 + static_cast<double>(inputs) * 0x1p-24;
    CHECK(worst_error(out.values(), expected, bound, 1e-6) <= 1);
  });
}

// The weight's numbers are bf16; x is rounded to it where the CPU multiplies such.
void compare_linear_bf16(int64_t rows, int64_t outputs, int64_t inputs, int64_t activation) {
  const auto rounded = [](std::vector<float> values) {
    for (float& value : values) value = from_bf16(to_bf16(value));
    return values;
  };
  Random random(29);
  // Rounded too, so that there is one right answer.
  const auto x = rounded(random.floats(rows * inputs)),
             w = rounded(random.floats(outputs * inputs)), b = random.floats(outputs);
  const auto run_at = [&](const char* kind, Place place) {
    const Buffer<float> xs(x, place), ws(w, place), bs(b, place);
    Buffer<float> out(static_cast<size_t>(rows * outputs), place);
    const std::vector<Tensor> operands = {tensor(xs.data(), Dtype::f32, {rows, inputs}),
                                          tensor(ws.data(), Dtype::f32, {outputs, inputs}),
                                          tensor(bs.data(), Dtype::f32, {outputs}),
                                          tensor(out.data(), Dtype::f32, {rows, outputs})};
    CHECK(run_step(kind, operands, {{"activation", kActivations[activation]}}).fault ==
          Fault::none);
    return out.values();
  };
  std::vector<float> expected;
  as_scalar([&] { expected = run_at("linear", Place::heap); });
  for_every_setting(named("linear_bf16", {rows, outputs, inputs, activation}), [&](Place place) {
    // As for `linear`, between two orders of adding.
    const double bound = 2e-5 + static_cast<double>(inputs) * 0x1p-23;
    CHECK(worst_error(run_at("linear_bf16", place), expected, bound, 2e-6) <= 1);
  });
}

}  // namespace

TEST(step_masked_attention) {
  for (const Heads& s : {Heads{1, 1, 1, 1, 1}, Heads{2, 2, 3, 5, 8}, Heads{3, 1, 17, 17, 9},
                         Heads{2, 4, 7, 33, 32}, Heads{3, 2, 33, 16, 17}})
    for (const Masking masking :
         {Masking::none, Masking::whole, Masking::of_keys, Masking::hides_all})
      for (const bool nans : {false, true}) {
        compare_masked(s, masking, true, false, nans);
        for (const bool caps : {false, true}) compare_masked(s, masking, false, caps, nans);
      }
}

TEST(step_causal_attention) {
  for (const Heads& s : {Heads{1, 1, 1, 1, 1}, Heads{2, 2, 15, 15, 8}, Heads{1, 3, 16, 16, 32},
                         Heads{2, 1, 17, 17, 9}, Heads{1, 2, 65, 65, 64}})
    compare_causal(s);
}

TEST(step_resumed_attention) {
  for (const Heads& s : {Heads{1, 1, 1, 1, 1}, Heads{2, 2, 15, 15, 8}, Heads{1, 3, 17, 17, 32},
                         Heads{2, 1, 33, 33, 9}})
    for (const int64_t now : {int64_t{1}, (s.keys + 2) / 3, s.keys}) {
      compare_resumed(s, now, 0, {});
      compare_resumed(s, now, 2, {4, 9});
    }
}

TEST(step_reduce) {
  for (const std::vector<int64_t>& sizes : {std::vector<int64_t>{1, 1, 1},
                                            {2, 3, 5},
                                            {0, 4, 3},
                                            {3, 1, 17},
                                            {2, 16, 65},
                                            {5, 70, 129},
                                            {9, 71, 1}}) {
    for (const char* operation : {"sum", "mean", "max"}) compare_reduce(sizes, operation);
    compare_integers(sizes);
  }
}

TEST(step_matmul) {
  for (const int64_t m : {0, 1, 7, 33})
    for (const int64_t k : {0, 1, 15, 40})
      for (const int64_t n : {1, 16, 35})
        for (const bool columns : {false, true}) compare_matmul(m, k, n, columns);
  compare_matmul(64, 70, 65, true);  // on threads
}

TEST(step_softmax) {
  for (const int64_t width : {1, 15, 16, 17, 64, 65, 700})
    for (const int64_t rows : {0, 1, 2, 5, 60}) compare_softmax(rows, width);
}

TEST(step_linear_of_few_outputs) {
  for (const int64_t outputs : {1, 2, 3, 4, 5})
    for (const int64_t inputs : {1, 15, 16, 17, 63, 65, 300})
      for (const int64_t rows : {0, 1, 15, 16, 17, 50})
        compare_linear(rows, outputs, inputs, (rows + inputs) % 2, (rows + outputs) % 3);
  compare_linear(700, 3, 300, true, 1);  // on threads
}

TEST(step_linear_bf16) {
  for (const int64_t outputs : {1, 5, 31, 33, 64})
    for (const int64_t inputs : {1, 15, 31, 32, 33, 65, 300})
      for (const int64_t rows : {0, 1, 11, 13, 50})
        compare_linear_bf16(rows, outputs, inputs, (rows + outputs) % 3);
  compare_linear_bf16(700, 40, 300, 1);  // on threads
}

TEST(step_grouped_linear) {
  Random random(61);
  for (const int64_t rows : {0, 1, 17})
    for (const int64_t inputs : {1, 7, 16, 33})
      for (const bool shuffle : {false, true})
        compare_with_scalar("grouped_linear",
                            {{{rows, 3 * inputs}, random.floats(rows * 3 * inputs), {}},
                             {{3, 5, inputs}, random.floats(15 * inputs), {}},
                             {{15}, random.floats(15), {}}},
                            {rows, 15}, {{"shuffle", shuffle}});
}

// Against the linear layer of the windows as rows; the last windows end where x does.
TEST(step_window_linear) {
  for (const int64_t parts : {1, 2, 3})
    for (const int64_t positions : {1, 5, 13})
      for (const int64_t outputs : {5, 33}) {
        constexpr int64_t kUsers = 3, kWidth = 16, kApart = 2;
        const int64_t length = positions + kApart * (parts - 1), inputs = parts * kWidth;
        Random random(73);
        const auto x = random.floats(kUsers * length * kWidth), b = random.floats(outputs),
                   w = random.floats(outputs * inputs);
        std::vector<float> expected;
        for (int64_t r = 0; r < kUsers * positions; ++r)
          for (int64_t n = 0; n < outputs; ++n) {
            double sum = b[n];
            for (int64_t i = 0; i < inputs; ++i) {
              const int64_t place = r / positions * length + r % positions + i / kWidth * kApart;
              sum += static_cast<double>(x[place * kWidth + i % kWidth]) * w[n * inputs + i];
            }
            expected.push_back(static_cast<float>(std::max(sum, 0.0)));
          }
        for_every_setting(named("window_linear", {parts, positions, outputs}), [&](Place place) {
          const Buffer<float> xs(x, place), ws(w, place), bs(b, place);
          Buffer<float> out(expected.size(), place);
          Tensor windows = tensor(xs.data(), Dtype::f32, {kUsers, positions, parts, kWidth});
          windows.strides[0] = length * kWidth;
          windows.strides[1] = kWidth;
          windows.strides[2] = kApart * kWidth;
          CHECK(run_step("window_linear",
                         {windows, tensor(ws.data(), Dtype::f32, {outputs, inputs}),
                          tensor(bs.data(), Dtype::f32, {outputs}),
                          tensor(out.data(), Dtype::f32, {kUsers, positions, outputs})},
                         {{"activation", "relu"}})
                    .fault == Fault::none);
          CHECK(worst_error(out.values(), expected, 1e-5, 1e-5) <= 1);
        });
      }
}

TEST(step_separable_projection) {
  Random random(67);
  for (const int64_t length : {1, 5, 33})
    for (const int64_t taps : {1, 3, 7})
      compare_with_scalar("separable_projection",
                          {{{2, length, 12}, random.floats(24 * length), {}},
                           {{12, taps}, random.floats(12 * taps), {}},
                           {{2, 5, 6}, random.floats(60), {}},
                           {{10}, random.floats(10), {}},
                           {{2}, {}, {length, length / 2}}},
                          {2, length, 10}, {{"before", taps / 2}});
}

TEST(step_window_sparse_attention) {
  Random random(71);
  for (const int64_t length : {1, 15, 33})
    for (const bool causal : {false, true}) {
      const std::vector<int64_t> sizes = {2, 2, length, 9};
      const auto draw = [&] { return Given{sizes, random.floats(36 * length), {}}; };
      const Given lengths{{2}, {}, {length, length / 3}};
      // A window of 2; the heads see two and no further distances.
      compare_with_scalar("window_sparse_attention", {draw(), draw(), draw(), lengths},
                          {2, length, 2, 9},
                          {{"scale", 0.3},
                           {"causal", causal},
                           {"window", 2},
                           {"distances", json::List{json::List{4, 8}, json::List{}}}});
    }
}

}  // namespace fastrec::tests
