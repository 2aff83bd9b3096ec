// The vector kernel, written once over sixteen lanes; an ISA file includes its vec16 header and
// this one. Three passes over rows that lie in L1 after the first.
#include "layer_norm_quantize/layer_norm_quantize.h"
#include "vec16_math.h"

namespace fastrec::layer_norm_quantize {
namespace {

constexpr int kAccumulators = 4;
constexpr int kStep = kAccumulators * kLanes;

struct Row {
  const float* x;
  const float* residual;  // null where x is the sum already
  FASTREC_VEC_INLINE Floats operator()(int64_t i) const {
    return residual ? add(load(x + i), load(residual + i)) : load(x + i);
  }
  FASTREC_VEC_INLINE Floats operator()(int64_t i, Lanes lanes) const {
    return residual ? add(load(x + i, lanes), load(residual + i, lanes)) : load(x + i, lanes);
  }
};

// The row that starts there, once it has been summed.
FASTREC_VEC_INLINE Row summed(const Call& call, int64_t at) {
  if (call.sum) return {call.sum + at, nullptr};
  return {call.x + at, call.residual ? call.residual + at : nullptr};
}

FASTREC_VEC_INLINE float total(const Floats* acc) {
  return sum_lanes(add(add(acc[0], acc[1]), add(acc[2], acc[3])));
}

// Sum of the row; stores the row itself where `keep` is not null.
FASTREC_VEC_INLINE float row_sum(const Row& row, int64_t dims, float* keep) {
  Floats acc[kAccumulators] = {zeros(), zeros(), zeros(), zeros()};
  int64_t i = 0;
  for (; i + kStep <= dims; i += kStep)
#pragma GCC unroll 4
    for (int k = 0; k < kAccumulators; ++k) {
      const Floats s = row(i + k * kLanes);
      if (keep) store(keep + i + k * kLanes, s);
      acc[k] = add(acc[k], s);
    }
#pragma GCC unroll 4
  for (int k = 0; k < kAccumulators; ++k, i += kLanes)
    if (i < dims) {
      const Lanes lanes = first_lanes(dims - i);
      const Floats s = row(i, lanes);
      if (keep) store(keep + i, s, lanes);
      acc[k] = add(acc[k], s);
    }
  return total(acc);
}

FASTREC_VEC_INLINE float row_squares(const Row& row, int64_t dims, Floats mean) {
  Floats acc[kAccumulators] = {zeros(), zeros(), zeros(), zeros()};
  int64_t i = 0;
  for (; i + kStep <= dims; i += kStep)
#pragma GCC unroll 4
    for (int k = 0; k < kAccumulators; ++k) {
      const Floats off = subtract(row(i + k * kLanes), mean);
      acc[k] = add(acc[k], multiply(off, off));
    }
#pragma GCC unroll 4
  for (int k = 0; k < kAccumulators; ++k, i += kLanes)
    if (i < dims) {
      const Lanes lanes = first_lanes(dims - i);
      const Floats off = blend(lanes, subtract(row(i, lanes), mean), zeros());
      acc[k] = add(acc[k], multiply(off, off));
    }
  return total(acc);
}

// Makes a NaN of the sum with the first NaN; infinities do not.
FASTREC_VEC_INLINE void note(Floats& poison, Floats value) {
  poison = add(poison, minimum(splat(1.0f), maximum(splat(-1.0f), value)));
}

// Mean and 1 / deviation of rows that follow each other. A row's steps wait for one another, those
// of different rows do not.
template <int count>
struct Statistics {
  Floats mean[count], rstd[count];
};

template <int count>
FASTREC_VEC_INLINE Statistics<count> statistics(const Call& call, int64_t at) {
  const int64_t dims = call.dims;
  const float size = static_cast<float>(dims);
  Statistics<count> found;
#pragma GCC unroll 4
  for (int r = 0; r < count; ++r) {
    const int64_t from = at + r * dims;
    const Row row{call.x + from, call.residual ? call.residual + from : nullptr};
    found.mean[r] = splat(row_sum(row, dims, call.sum ? call.sum + from : nullptr) / size);
  }
#pragma GCC unroll 4
  for (int r = 0; r < count; ++r) {
    const float squares = row_squares(summed(call, at + r * dims), dims, found.mean[r]);
    found.rstd[r] = splat(1.0f / __builtin_sqrtf(squares / size + call.eps));
  }
  return found;
}

template <int count>
FASTREC_VEC_INLINE void some_rows(const Call& call, int64_t first, const Quantiser& to,
                                  Floats& poison) {
  const int64_t dims = call.dims, whole = dims / kLanes * kLanes;
  const Lanes every = first_lanes(kLanes), tail = first_lanes(dims - whole);
  const Statistics<count> found = statistics<count>(call, first);
  for (int r = 0; r < count; ++r) {
    const int64_t at = first + r * dims;
    const Row row = summed(call, at);
    const Floats mean = found.mean[r], rstd = found.rstd[r];
    if (call.y_u8) {
      uint8_t* const y = static_cast<uint8_t*>(call.y) + at;
      for (int64_t i = 0; i < whole; i += kLanes) {
        Floats value = multiply(subtract(row(i), mean), rstd);
        if (call.weight) value = multiply(value, load(call.weight + i));
        if (call.bias) value = add(value, load(call.bias + i));
        note(poison, value);
        store_u8(y + i, quantise(value, to), every);
      }
    } else {
      float* const y = static_cast<float*>(call.y) + at;
      for (int64_t i = 0; i < whole; i += kLanes) {
        Floats value = multiply(subtract(row(i), mean), rstd);
        if (call.weight) value = multiply(value, load(call.weight + i));
        if (call.bias) value = add(value, load(call.bias + i));
        store(y + i, value);
      }
    }
    if (whole < dims) {
      Floats value = multiply(subtract(row(whole, tail), mean), rstd);
      if (call.weight) value = multiply(value, load(call.weight + whole, tail));
      if (call.bias) value = add(value, load(call.bias + whole, tail));
      if (call.y_u8) {
        note(poison, blend(tail, value, zeros()));
        store_u8(static_cast<uint8_t*>(call.y) + at + whole, quantise(value, to), tail);
      } else {
        store(static_cast<float*>(call.y) + at + whole, value, tail);
      }
    }
  }
}

FASTREC_VEC bool rows(const Call& call, int64_t begin, int64_t end) {
  constexpr int kAtOnce = 4;
  const Quantiser to = quantiser(call.quantisation);
  Floats poison = zeros();
  int64_t row = begin;
  for (; row + kAtOnce <= end; row += kAtOnce)
    some_rows<kAtOnce>(call, row * call.dims, to, poison);
  for (; row < end; ++row) some_rows<1>(call, row * call.dims, to, poison);
  return !any_nan(poison);
}

}  // namespace
}  // namespace fastrec::layer_norm_quantize
