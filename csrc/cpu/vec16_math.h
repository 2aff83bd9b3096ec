// Functions of sixteen lanes; included after one of the vec16 headers. element.h holds the same
// steps for one element.
#pragma once

#include "gelu.h"
#include "quantisation.h"

namespace fastrec {
namespace {

struct Quantiser {
  Floats inverse_scale, low, high;
  Ints zero_point;
};

FASTREC_VEC_INLINE Quantiser quantiser(Quantisation to) {
  return {splat(1.0f / to.scale), splat(static_cast<float>(-to.zero_point)),
          splat(static_cast<float>(255 - to.zero_point)), splat_int(to.zero_point)};
}

FASTREC_VEC_INLINE Ints quantise(Floats value, const Quantiser& to) {
  const Floats scaled = multiply(value, to.inverse_scale);
  return add_int(to_int(minimum(maximum(scaled, to.low), to.high)), to.zero_point);
}

// A NaN stays one.
FASTREC_VEC_INLINE Floats gelu(Floats value) {
  Floats y = multiply(value, splat(kSqrtHalf));
  y = minimum(splat(kErfLimit), maximum(splat(-kErfLimit), y));
  const Floats u = multiply(y, y);
  Floats p = splat(kErfP[5]), q = splat(kErfQ[5]);
#pragma GCC unroll 8
  for (int i = 4; i >= 0; --i) {
    p = fma(p, u, splat(kErfP[i]));
    q = fma(q, u, splat(kErfQ[i]));
  }
  const Floats erf = divide(multiply(y, p), q);
  const Floats half = multiply(splat(0.5f), value);
  return fma(half, minimum(splat(1.0f), maximum(splat(-1.0f), erf)), half);
}

}  // namespace
}  // namespace fastrec
