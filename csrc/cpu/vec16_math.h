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

// 2^x: 2^round(x) * 2^r, |r| <= 1/2, by a polynomial (relative error below 2e-7); 0 below 2^-149 or
// before.
FASTREC_VEC_INLINE Floats exp2(Floats x) {
  x = maximum(splat(-200.0f), x);
  const Floats n = round_half_even(x);
  const Floats r = subtract(x, n);
  Floats p = splat(1.535336188319500e-4f);
  p = fma(p, r, splat(1.339887440266574e-3f));
  p = fma(p, r, splat(9.618437357674640e-3f));
  p = fma(p, r, splat(5.550332471162809e-2f));
  p = fma(p, r, splat(2.402264791363012e-1f));
  p = fma(p, r, splat(6.931472028550421e-1f));
  p = fma(p, r, splat(1.0f));
  return scale_by_power(p, n);
}

// A NaN stays one.
FASTREC_VEC_INLINE Floats gelu(Floats value) {
  const Floats s = minimum(splat(kErfLast), multiply(absolute(value), splat(kErfPieces)));
  const Floats piece = add(s, splat(kErfRound));
  const Floats t = subtract(s, subtract(piece, splat(kErfRound)));
  Floats erf = pick(kErf[kErfDegree], piece);
#pragma GCC unroll 8
  for (int i = kErfDegree - 1; i >= 0; --i) erf = fma(erf, t, pick(kErf[i], piece));
  const Floats half = multiply(splat(0.5f), value);
  return fma(absolute(half), erf, half);
}

}  // namespace
}  // namespace fastrec
