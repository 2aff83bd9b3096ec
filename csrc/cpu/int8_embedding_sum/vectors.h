// The vector kernel, written once over sixteen lanes; an ISA file includes its vec16 header and
// this one. A block of kBlock registers is summed over all tables before it is written; rows a few
// lookups ahead are prefetched from tables that do not fit the caches.
#include <algorithm>

#include "int8_embedding_sum/int8_embedding_sum.h"
#include "vec16_math.h"

namespace fastrec::int8_embedding_sum {
namespace {

constexpr int kBlock = 4;
constexpr int64_t kLine = 64;
constexpr int64_t kAhead = 8;                 // lookups: about one memory latency of work
constexpr int64_t kFitsCaches = 256 * 1024;   // bytes of a table
constexpr int64_t kEntryBytes[] = {1, 4, 2};  // by Type

// The rows of all tables for one output row; what is padding is left out.
struct Sources {
  const void* rows[kMaxTables];
  float scale[kMaxTables];
  Type type[kMaxTables];
  int count;
};

void prefetch(const Call& call, int64_t n) {
  for (int t = 0; t < call.table_count; ++t) {
    const Table& table = call.tables[t];
    const int64_t row_bytes = call.dims * kEntryBytes[static_cast<int>(table.type)];
    if (table.count * row_bytes <= kFitsCaches) continue;
    const int64_t row = row_of(table, n);
    if (row < 0) continue;
    const char* from = static_cast<const char*>(table.rows) + row * row_bytes;
    for (int64_t b = 0; b < row_bytes; b += kLine) __builtin_prefetch(from + b);
    if (table.scale) __builtin_prefetch(table.scale + row);
  }
}

void find(const Call& call, int64_t n, Sources& sources) {
  sources.count = 0;
  for (int t = 0; t < call.table_count; ++t) {
    const Table& table = call.tables[t];
    const int64_t row = row_of(table, n);
    if (row < 0) continue;
    const int64_t row_bytes = call.dims * kEntryBytes[static_cast<int>(table.type)];
    sources.rows[sources.count] = static_cast<const char*>(table.rows) + row * row_bytes;
    sources.scale[sources.count] = table.type == Type::s8 ? table.scale[row] : 1.0f;
    sources.type[sources.count++] = table.type;
  }
}

// The sum of sixteen entries, a few of them at the end of a row, for `vectors` registers.
template <int vectors>
FASTREC_VEC_INLINE void sum_block(const Sources& sources, int64_t d, Lanes lanes, Floats* sum) {
#pragma GCC unroll 4
  for (int c = 0; c < vectors; ++c) sum[c] = zeros();
  for (int t = 0; t < sources.count; ++t) {
    if (sources.type[t] == Type::s8) {
      const Floats scale = splat(sources.scale[t]);
      const int8_t* from = static_cast<const int8_t*>(sources.rows[t]) + d;
#pragma GCC unroll 4
      for (int c = 0; c < vectors; ++c) {
        const Ints entries =
            vectors > 1 ? load_s8(from + c * kLanes) : load_s8(from + c * kLanes, lanes);
        sum[c] = add(sum[c], multiply(to_float(entries), scale));
      }
    } else if (sources.type[t] == Type::f32) {
      const float* from = static_cast<const float*>(sources.rows[t]) + d;
#pragma GCC unroll 4
      for (int c = 0; c < vectors; ++c)
        sum[c] =
            add(sum[c], vectors > 1 ? load(from + c * kLanes) : load(from + c * kLanes, lanes));
    } else {
      const uint16_t* from = static_cast<const uint16_t*>(sources.rows[t]) + d;
#pragma GCC unroll 4
      for (int c = 0; c < vectors; ++c) sum[c] = add(sum[c], load_bf16(from + c * kLanes, lanes));
    }
  }
}

FASTREC_VEC_INLINE void put(const Call& call, int64_t at, Floats sum, Lanes lanes,
                            const Quantiser& to, Floats& poison) {
  if (!call.out_u8) return store(static_cast<float*>(call.out) + at, sum, lanes);
  // Smaller than infinity, so that only a NaN makes a NaN of the total.
  poison = add(poison, minimum(splat(1.0f), maximum(splat(-1.0f), sum)));
  store_u8(static_cast<uint8_t*>(call.out) + at, quantise(sum, to), lanes);
}

FASTREC_VEC bool gather(const Call& call, int64_t begin, int64_t end) {
  const Quantiser to = quantiser(call.quantisation);
  const Lanes every = first_lanes(kLanes);
  Floats poison = zeros();
  Sources sources;
  for (int64_t n = begin; n < end; ++n) {
    if (n + kAhead < end) prefetch(call, n + kAhead);
    find(call, n, sources);
    const int64_t at = n * call.dims;
    int64_t d = 0;
    for (; d + kBlock * kLanes <= call.dims; d += kBlock * kLanes) {
      Floats sum[kBlock];
      sum_block<kBlock>(sources, d, every, sum);
#pragma GCC unroll 4
      for (int c = 0; c < kBlock; ++c) put(call, at + d + c * kLanes, sum[c], every, to, poison);
    }
    for (; d < call.dims; d += kLanes) {
      const Lanes lanes = first_lanes(call.dims - d);
      Floats sum[1];
      sum_block<1>(sources, d, lanes, sum);
      put(call, at + d, sum[0], lanes, to, poison);
    }
  }
  return !any_nan(poison);
}

}  // namespace
}  // namespace fastrec::int8_embedding_sum
