// The forward over blocks of 32 or 16 queries as lanes, for every vector instruction set. Included
// after vec16_<isa>.h and the ISA's dot products:
//   kQueryVectors: registers of queries; kAtOnce: keys, or dims, whose sums stay in registers;
//   kGroup: numbers that a lane multiplies at once, u8 x s8 in fours or s16 x s16 in twos;
//   kOffset: what is added to the lanes' numbers to make them unsigned (taken off the sums again);
//   Number: of the packed keys and values; dot(sum, lanes, group).
//   group_of(numbers): kGroup integers of a lane side by side;
// and load_ints, store_ints, gather(table, numbers), find_buckets(...).
#pragma once

#include "pointwise_attention_int8/steps.h"

namespace fastrec::pointwise_attention_int8 {
namespace {

constexpr int kBlock = kQueryVectors * kLanes;

int64_t up(int64_t count, int64_t multiple) { return (count + multiple - 1) / multiple * multiple; }

// A packed head: keys [rows][D / kGroup] groups, with kOffset times a key's sum taken off in
// key_start[row]; values [rows / kGroup][Dv] groups, the same of each run in value_start[run][Dv].
// Rows and dims that are not there are 0.
struct Layout {
  int64_t groups, value_dims, rows, runs;
  explicit Layout(const Call& call, int64_t count)
      : groups(up(call.shape.dims, kGroup) / kGroup),
        value_dims(up(call.shape.value_dims, kAtOnce)),
        rows(up(count, kRun)),
        runs(rows / kRun) {}
  int64_t ints() const {
    return up(rows * groups + rows + rows / kGroup * value_dims + runs * value_dims, 16);
  }
};
struct Head {
  int32_t *keys, *key_start, *values, *value_start;
  Head(const Layout& layout, uint8_t* data) {
    keys = static_cast<int32_t*>(static_cast<void*>(data));
    key_start = keys + layout.rows * layout.groups;
    values = key_start + layout.rows;
    value_start = values + layout.rows / kGroup * layout.value_dims;
  }
};

int64_t packed_bytes(const Call& call, int64_t rows) {
  return rows ? Layout(call, rows).ints() * static_cast<int64_t>(sizeof(int32_t)) : 0;
}

void pack(const Call& call, const Sequence& sequence, int64_t head, uint8_t* to) {
  if (sequence.rows == 0) return;
  const Layout layout(call, sequence.rows);
  const Head packed(layout, to);
  std::fill_n(packed.keys, layout.ints(), 0);
  const auto k = rows_of<const int8_t>(call.k, sequence, head),
             v = rows_of<const int8_t>(call.v, sequence, head);
  auto* const keys = static_cast<Number*>(static_cast<void*>(packed.keys));
  auto* const values = static_cast<Number*>(static_cast<void*>(packed.values));
  for (int64_t j = 0; j < sequence.rows; ++j) {
    int32_t sum = 0;
    for (int64_t d = 0; d < call.shape.dims; ++d) {
      keys[j * layout.groups * kGroup + d] = k[j][d];
      sum += k[j][d];
    }
    packed.key_start[j] = -kOffset * sum;
    Number* const group = values + j / kGroup * layout.value_dims * kGroup + j % kGroup;
    int32_t* const start = packed.value_start + j / kRun * layout.value_dims;
    for (int64_t d = 0; d < call.shape.value_dims; ++d) {
      group[d * kGroup] = v[j][d];
      start[d] -= kOffset * v[j][d];
    }
  }
}

// [D / kGroup][lane] groups of a block's queries.
void pack_queries(Rows<const int8_t> q, int64_t begin, int64_t count, int64_t dims, int32_t* to) {
  std::fill_n(to, up(dims, kGroup) / kGroup * kBlock, 0);
  auto* const numbers = static_cast<Number*>(static_cast<void*>(to));
  for (int64_t r = 0; r < count; ++r)
    for (int64_t d = 0; d < dims; ++d)
      numbers[(d / kGroup * kBlock + r) * kGroup + d % kGroup] =
          static_cast<Number>(q[begin + r][d] + kOffset);
}

// sums[n][lane] = start[n] + sum over g of lanes[g][lane] . a group, kAtOnce n. The group of n and
// g: others[n][g], rows `stride` apart, or, across, others[g][n].
template <bool across>
FASTREC_VEC __attribute__((noinline)) void products(const int32_t* lanes, const int32_t* others,
                                                    int64_t stride, int64_t groups,
                                                    const int32_t* start, int32_t* to) {
  Ints acc[kAtOnce][kQueryVectors];
#pragma GCC unroll 8
  for (int n = 0; n < kAtOnce; ++n)
#pragma GCC unroll 2
    for (int v = 0; v < kQueryVectors; ++v) acc[n][v] = splat_int(start[n]);
  for (int64_t g = 0; g < groups; ++g, others += across ? stride : 1) {
    Ints lane[kQueryVectors];
#pragma GCC unroll 2
    for (int v = 0; v < kQueryVectors; ++v) lane[v] = load_ints(lanes + g * kBlock + v * kLanes);
#pragma GCC unroll 8
    for (int n = 0; n < kAtOnce; ++n) {
      const Ints other = splat_int(others[across ? n : n * stride]);
#pragma GCC unroll 2
      for (int v = 0; v < kQueryVectors; ++v) acc[n][v] = dot(acc[n][v], lane[v], other);
    }
  }
#pragma GCC unroll 8
  for (int n = 0; n < kAtOnce; ++n)
#pragma GCC unroll 2
    for (int v = 0; v < kQueryVectors; ++v) store_ints(to + n * kBlock + v * kLanes, acc[n][v]);
}

// x / (1 + e^-x) in the header's steps.
FASTREC_VEC_INLINE Floats silu_lanes(Floats x) {
  const Floats p = minimum(splat(126.0f), maximum(splat(-126.0f), multiply(x, splat(kMinusLog2E))));
  const Floats n = round_half_even(p), r = subtract(p, n);
  Floats e = splat(kPower[0]);
#pragma GCC unroll 6
  for (int i = 1; i < 7; ++i) e = add(multiply(e, r), splat(kPower[i]));
  e = scale_by_power(e, n);
  return multiply(x, divide(splat(1.0f), add(splat(1.0f), e)));
}

// Scores of a run to groups of rounded weights, [kRun / kGroup][lane], and each lane's m.
// begin: the run's first key; keys: how many of it may be seen at all.
FASTREC_VEC __attribute__((noinline)) void weigh(const Call& call, const float* position,
                                                 const float* time, const int32_t* buckets,
                                                 int64_t i0, int64_t begin, int64_t keys,
                                                 const int32_t* scores, float* weights,
                                                 int32_t* groups, float* largest) {
  Floats most[kQueryVectors];
  for (Floats& m : most) m = splat(kSmallest);
  const Floats scale = splat(call.score_scale);
  for (int64_t n = 0; n < keys; ++n) {
    const int64_t first = call.causal ? std::max<int64_t>(0, begin + n - i0) : 0;
#pragma GCC unroll 2
    for (int v = 0; v < kQueryVectors; ++v) {
      const int64_t at = n * kBlock + v * kLanes;
      Floats x = multiply(to_float(load_ints(scores + at)), scale);
      if (position) x = add(x, load(position + i0 - begin - n + v * kLanes));
      if (time) x = add(x, gather(time, buckets + at));
      Floats w = silu_lanes(x);
      if (first > v * kLanes) w = blend(first_lanes(first - v * kLanes), zeros(), w);
      most[v] = maximum(most[v], absolute(w));
      store(weights + at, w);
    }
  }
  std::fill_n(weights + keys * kBlock, (kRun - keys) * kBlock, 0.0f);
  const Ints offset = splat_int(kOffset);
#pragma GCC unroll 2
  for (int v = 0; v < kQueryVectors; ++v) {
    store(largest + v * kLanes, most[v]);
    const Floats inverse = divide(splat(127.0f), most[v]);
    for (int64_t n = 0; n < kRun; n += kGroup) {
      Ints number[kGroup];
#pragma GCC unroll 4
      for (int g = 0; g < kGroup; ++g) {
        const Floats w = load(weights + (n + g) * kBlock + v * kLanes);
        number[g] = add_int(to_int(multiply(w, inverse)), offset);
      }
      store_ints(groups + n / kGroup * kBlock + v * kLanes, group_of(number));
    }
  }
}

// sum[d][lane] += products * m / 127
FASTREC_VEC_INLINE void add_products(const int32_t* totals, int64_t dims, const float* largest,
                                     float* sum) {
#pragma GCC unroll 2
  for (int v = 0; v < kQueryVectors; ++v) {
    const Floats step = divide(load(largest + v * kLanes), splat(127.0f));
    for (int64_t d = 0; d < dims; ++d) {
      const int64_t at = d * kBlock + v * kLanes;
      store(sum + at, add(load(sum + at), multiply(to_float(load_ints(totals + at)), step)));
    }
  }
}

int64_t scratch_floats(const Call& call) {
  const Layout layout(call, kRun);
  return kBlock *
             (call.shape.heads * (layout.groups + layout.value_dims) + kAtOnce + 4 * kRun + 1) +
         2 * kBlock;
}

FASTREC_VEC void forward(const Call& call, const Tables& tables, const Part& part,
                         const uint8_t* packed, float* scratch) {
  const Sequence& sequence = part.sequence;
  const int64_t heads = call.shape.heads, value_dims = call.shape.value_dims;
  const int64_t history = sequence.history, bytes = packed_bytes(call, sequence.rows);
  const Layout layout(call, sequence.rows);
  const auto take = [&](int64_t count) {
    float* const from = scratch;
    scratch += count;
    return from;
  };
  const auto ints = [](float* from) { return static_cast<int32_t*>(static_cast<void*>(from)); };
  auto* const query_times = static_cast<int64_t*>(static_cast<void*>(take(2 * kBlock)));
  int32_t* const queries = ints(take(heads * layout.groups * kBlock));
  float* const sum = take(heads * layout.value_dims * kBlock);
  int32_t* const scores = ints(take(kRun * kBlock));
  int32_t* const buckets = ints(take(kRun * kBlock));
  float* const weights = take(kRun * kBlock);
  int32_t* const groups = ints(take(kRun * kBlock));
  int32_t* const totals = ints(take(kAtOnce * kBlock));
  float* const largest = take(kBlock);
  const int64_t at = times_at(call.shape, sequence);
  for (int64_t i0 = part.begin; i0 < part.end; i0 += kBlock) {
    const int64_t count = std::min<int64_t>(kBlock, part.end - i0);
    for (int64_t h = 0; h < heads; ++h)
      pack_queries(rows_of<const int8_t>(call.q, sequence, h), i0, count, call.shape.dims,
                   queries + h * layout.groups * kBlock);
    std::fill_n(sum, heads * layout.value_dims * kBlock, 0.0f);
    if (call.bias.time)
      for (int64_t r = 0; r < kBlock; ++r)
        query_times[r] = call.bias.query_times[at + i0 + std::min(r, count - 1)];
    const int64_t end = call.causal ? std::min(history, i0 + count) : history;
    for (int64_t begin = 0; begin < end; begin += kRun) {
      const int64_t keys = std::min(kRun, end - begin);
      if (call.bias.time)
        find_buckets(tables.buckets, query_times, call.bias.times + at + begin, keys, buckets);
      for (int64_t h = 0; h < heads; ++h) {
        const Head head(layout, const_cast<uint8_t*>(packed) + h * bytes);
        for (int64_t n = 0; n < keys; n += kAtOnce)
          products<false>(queries + h * layout.groups * kBlock,
                          head.keys + (begin + n) * layout.groups, layout.groups, layout.groups,
                          head.key_start + begin + n, scores + n * kBlock);
        weigh(call, tables.position_of(h), tables.time_of(h), buckets, i0, begin, keys, scores,
              weights, groups, largest);
        const int32_t* const values = head.values + begin / kGroup * layout.value_dims;
        const int32_t* const start = head.value_start + begin / kRun * layout.value_dims;
        for (int64_t d = 0; d < layout.value_dims; d += kAtOnce) {
          products<true>(groups, values + d, layout.value_dims, kRun / kGroup, start + d, totals);
          add_products(totals, kAtOnce, largest, sum + (h * layout.value_dims + d) * kBlock);
        }
      }
    }
    for (int64_t h = 0; h < heads; ++h) {
      float* const own = sum + h * layout.value_dims * kBlock;
      const Weights weight(call, tables, sequence, h);
      const auto v = rows_of<const int8_t>(call.v, sequence, h);
      const auto out = rows_of<float>(call.out, sequence, h);
      for (int64_t r = 0; r < count; ++r) {
        if (i0 + r >= history) {
          const float w = weight(i0 + r, i0 + r);
          add_run(&w, v, i0 + r, i0 + r + 1, value_dims, own + r, kBlock);
        }
        for (int64_t d = 0; d < value_dims; ++d)
          out[i0 + r][d] = own[d * kBlock + r] * call.out_scale;
      }
    }
  }
}

}  // namespace
}  // namespace fastrec::pointwise_attention_int8
