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
