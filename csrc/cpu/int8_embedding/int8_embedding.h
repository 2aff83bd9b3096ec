// int8_embedding: out[i, d] = scale[id[i]] * table[id[i], d]
//
// ids i64 [n], table s8 [rows, D], scale f32 [rows], out f32 [n, D] contiguous. Exact: an s8 times
// an f32 is rounded once. An id outside [0, rows) is reported, never read.
#pragma once

#include <cstdint>

#include "isa.h"

namespace fastrec::int8_embedding {

struct Call {
  const int64_t* ids;
  const int8_t* table;
  const float* scale;
  float* out;
  int64_t count, rows, dims;
};

struct Kernel {
  Isa isa;
  void (*gather)(const Call& call, int64_t begin, int64_t end);  // ids have been checked
};

extern const Kernel kScalar;
extern const Kernel kAvx2;
extern const Kernel kAvx512;

const Kernel& select();

// Position of the first id outside the table, or -1 and out is written.
int64_t run(const Call& call);

}  // namespace fastrec::int8_embedding
