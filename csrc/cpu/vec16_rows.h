// Rows of float, bfloat16 or float16 as sixteen floats at a time; included after one of the vec16
// headers.
#pragma once

#include "float16.h"

namespace fastrec {
namespace {

FASTREC_VEC_INLINE Floats load_row(const float* from, const Lanes& lanes) {
  return load(from, lanes);
}
FASTREC_VEC_INLINE Floats load_row(const Bf16* from, const Lanes& lanes) {
  return load_bf16(&from->bits, lanes);
}
FASTREC_VEC_INLINE Floats load_row(const F16* from, const Lanes& lanes) {
  return load_f16(&from->bits, lanes);
}
FASTREC_VEC_INLINE Floats load_row(const float* from) { return load(from); }
FASTREC_VEC_INLINE Floats load_row(const Bf16* from) {
  return load_bf16(&from->bits, first_lanes(kLanes));
}
FASTREC_VEC_INLINE Floats load_row(const F16* from) {
  return load_f16(&from->bits, first_lanes(kLanes));
}
FASTREC_VEC_INLINE void store_row(float* to, Floats x, const Lanes& lanes) { store(to, x, lanes); }
FASTREC_VEC_INLINE void store_row(Bf16* to, Floats x, const Lanes& lanes) {
  store_bf16(&to->bits, x, lanes);
}
FASTREC_VEC_INLINE void store_row(F16* to, Floats x, const Lanes& lanes) {
  store_f16(&to->bits, x, lanes);
}

}  // namespace
}  // namespace fastrec
