// Kinds along the middle dimension of x [A, N, C], or with its number of elements to share out.
#pragma once

#include "engine/check.h"
#include "parallel.h"

namespace fastrec::engine {

inline int threads_for(const Tensor& x) {
  constexpr int64_t kParallelElements = 32'768;
  return x.count() < kParallelElements ? 1 : num_threads();
}

// x f32, or i64 too, and y of its dtype; both contiguous.
inline void check_middle(const StepCheck& check, int x, int y, bool integers) {
  if (integers)
    check.dense(x, {Dtype::f32, Dtype::i64});
  else
    check.dense(x, {Dtype::f32});
  require(check.sizes(x).size() == 3, "an operand of three dimensions");
  check.dense(y, {check.dtype(x)});
}

}  // namespace fastrec::engine
