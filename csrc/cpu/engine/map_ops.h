// The instructions of `map` steps, one table for C++ and Python.
#pragma once

// X(name, registers read). Registers hold float or int64 (comparisons and bool: 0 or 1).
// "number" and "integer" are constants, "index" is the position along a dimension. Quotients of
// integers are rounded down and remainders have the divisor's sign, as in Python; by 0 both are
// refused. floor_div_f32 is torch's: its multiple of the divisor is exact, where the quotient
// rounds.
#define FASTREC_MAP_OPS(X) \
  X(number, 0)             \
  X(integer, 0)            \
  X(index, 0)              \
  X(add_f32, 2)            \
  X(sub_f32, 2)            \
  X(mul_f32, 2)            \
  X(div_f32, 2)            \
  X(max_f32, 2)            \
  X(min_f32, 2)            \
  X(neg_f32, 1)            \
  X(abs_f32, 1)            \
  X(exp_f32, 1)            \
  X(log_f32, 1)            \
  X(sqrt_f32, 1)           \
  X(rsqrt_f32, 1)          \
  X(tanh_f32, 1)           \
  X(sigmoid_f32, 1)        \
  X(relu_f32, 1)           \
  X(gelu_f32, 1)           \
  X(silu_f32, 1)           \
  X(pow_f32, 2)            \
  X(rem_f32, 2)            \
  X(floor_div_f32, 2)      \
  X(erf_f32, 1)            \
  X(sin_f32, 1)            \
  X(cos_f32, 1)            \
  X(floor_f32, 1)          \
  X(ceil_f32, 1)           \
  X(trunc_f32, 1)          \
  X(round_f32, 1)          \
  X(expm1_f32, 1)          \
  X(log1p_f32, 1)          \
  X(lt_f32, 2)             \
  X(le_f32, 2)             \
  X(eq_f32, 2)             \
  X(where_f32, 3)          \
  X(add_i64, 2)            \
  X(sub_i64, 2)            \
  X(mul_i64, 2)            \
  X(max_i64, 2)            \
  X(min_i64, 2)            \
  X(lt_i64, 2)             \
  X(le_i64, 2)             \
  X(eq_i64, 2)             \
  X(where_i64, 3)          \
  X(and_i64, 2)            \
  X(or_i64, 2)             \
  X(not_i64, 1)            \
  X(div_i64, 2)            \
  X(rem_i64, 2)            \
  X(xor_i64, 2)            \
  X(to_i64, 1)             \
  X(to_f32, 1)

namespace fastrec::engine {

enum class MapOp : int {
#define FASTREC_MAP_ENUM(name, reads) name,
  FASTREC_MAP_OPS(FASTREC_MAP_ENUM)
#undef FASTREC_MAP_ENUM
};

inline constexpr const char* kMapOpNames[] = {
#define FASTREC_MAP_NAME(name, reads) #name,
    FASTREC_MAP_OPS(FASTREC_MAP_NAME)
#undef FASTREC_MAP_NAME
};
inline constexpr int kMapOpReads[] = {
#define FASTREC_MAP_READS(name, reads) reads,
    FASTREC_MAP_OPS(FASTREC_MAP_READS)
#undef FASTREC_MAP_READS
};
inline constexpr int kMapOps = sizeof(kMapOpNames) / sizeof(*kMapOpNames);

// Inputs and instructions of one step together.
inline constexpr int kMaxRegisters = 24;

}  // namespace fastrec::engine
