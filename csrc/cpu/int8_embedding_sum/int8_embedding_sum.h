// int8_embedding_sum: out[n] = sum_t row of table t for n, added in the order of the tables
//
// Up to kMaxTables tables of `dims` columns: s8 with a scale f32 [count] (entry = float(s8) *
// scale, rounded), f32 or bf16. The row is ids[n] of the table, or n % period where ids is null (a
// position table). An id equal to padding_id adds nothing (padding_id < 0: there is none). The sum
// starts at 0 and is fp32, each addition rounded, so that every instruction set gives the same
// bits. out f32 or u8 [n, dims]. Every id is checked before anything is written; nothing outside a
// row is read.
#pragma once

#include <cstdint>

#include "isa.h"
#include "quantisation.h"

namespace fastrec::int8_embedding_sum {

inline constexpr int kMaxTables = 8;

enum class Type : int { s8, f32, bf16 };

struct Table {
  const void* rows;    // [count, dims]
  const float* scale;  // [count] with s8
  const int64_t* ids;  // [n] or null
  Type type;
  int64_t count;
  int64_t period;  // 1..count where ids is null
  int64_t padding_id;
};

struct Call {
  Table tables[kMaxTables];
  int table_count;
  void* out;
  bool out_u8;
  Quantisation quantisation;  // of a u8 out
  int64_t rows, dims;
};

// The row of table `t` for output row n, or -1 where it is padding.
inline int64_t row_of(const Table& table, int64_t n) {
  const int64_t row = table.ids ? table.ids[n] : n % table.period;
  return table.ids && row == table.padding_id ? -1 : row;
}

struct Kernel {
  Isa isa;
  // Output rows [begin, end) of checked ids. False if a value to be quantised is a NaN: out is then
  // undefined.
  bool (*gather)(const Call& call, int64_t begin, int64_t end);
};

extern const Kernel kScalar;
extern const Kernel kAvx2;
extern const Kernel kAvx512;

const Kernel& select();

enum class Status : int { done, bad_id, not_a_number };

struct Result {
  Status status;
  int table;         // of the first bad id, tables in order
  int64_t position;  // of that id in its table's ids
};

// The first bad id of output rows [begin, end), status done if there is none.
Result check(const Call& call, int64_t begin, int64_t end);
// Checks, then gathers on the thread pool.
Result run(const Call& call);

}  // namespace fastrec::int8_embedding_sum
