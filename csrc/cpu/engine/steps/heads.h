// The operands q, k and v [B, H, rows, D] that every kind of attention begins with.
#pragma once

#include "engine/check.h"

namespace fastrec::engine {

// Of the queries.
struct Heads {
  Extent batch, heads, queries, dims;
};

// q, k and v at positions 0 to 2, each of its dtypes, and a result of the queries' size.
Heads check_heads(const StepCheck& check, int y, Dtypes q_dtypes, Dtypes k_dtypes, Dtypes v_dtypes);
inline Heads check_heads(const StepCheck& check, int y) {
  const Heads heads = check_heads(check, y, {Dtype::f32}, {Dtype::f32}, {Dtype::f32});
  check.dense(y, {Dtype::f32});
  return heads;
}
// As many keys as queries, whose positions are the same.
void check_self_attention(const StepCheck& check, const Heads& heads);
// i64 [B], contiguous.
void check_lengths(const StepCheck& check, int lengths, const Extent& batch);

}  // namespace fastrec::engine
