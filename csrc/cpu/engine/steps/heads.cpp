#include "engine/steps/heads.h"

namespace fastrec::engine {

Heads check_heads(const StepCheck& check, int y, Dtypes q_dtypes, Dtypes k_dtypes,
                  Dtypes v_dtypes) {
  const Dtypes* const dtypes[] = {&q_dtypes, &k_dtypes, &v_dtypes};
  for (int o = 0; o < 3; ++o) {
    require(check.sizes(o).size() == 4 && check.is(o, *dtypes[o]), "4-D operands of their dtypes");
    check.unit(o, 3, "contiguous heads");
  }
  const Shape &q = check.sizes(0), &k = check.sizes(1);
  require(q[3].number().value_or(0) > 0, "heads of a fixed size");
  require(k == check.sizes(2) && k == Shape{q[0], q[1], k[2], q[3]}, "keys like the queries");
  // Nothing else bounds keys that are one row for all.
  for (int o = 1; o < 3; ++o) {
    int degree = 0;
    for (const uint8_t exponent : k[2].exponent) degree += exponent;
    require(check.view(o).strides[2].coefficient > 0 || (degree <= 1 && k[2].coefficient <= 1024),
            "keys of their own");
  }
  check.elements(y, product({q[0], q[2], q[1], q[3]}), "a result of the queries' size");
  return {q[0], q[1], q[2], q[3]};
}

void check_self_attention(const StepCheck& check, const Heads& heads) {
  require(check.sizes(1)[2] == heads.queries, "as many keys as queries");
}

void check_lengths(const StepCheck& check, int lengths, const Extent& batch) {
  check.dense(lengths, {Dtype::i64});
  require(check.sizes(lengths) == Shape{batch}, "a length a sequence");
}

}  // namespace fastrec::engine
