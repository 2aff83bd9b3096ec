// activation_quantize: y = quantise(act(x)), or y = quantise(act(float(acc) * scale[c] + bias[c]))
//
// x f32 or bf16 of any shape, or int32 accumulators [rows, C] with scale f32 [C] and an optional
// bias f32 [C]; all contiguous. y u8, bf16 (rounded half to even) or f32 of the same shape; y may
// be x where the element sizes agree. The int32 is converted (rounded) to fp32 first; product and
// bias are rounded each; gelu as in gelu.h. Every instruction set gives the same bits. Nothing
// beyond the elements is read.
#pragma once

#include <cstdint>

#include "isa.h"
#include "quantisation.h"

namespace fastrec::activation_quantize {

enum class Activation : int { none, relu, gelu };
inline constexpr const char* kActivationNames[] = {"none", "relu", "gelu"};
enum class Input : int { f32, bf16, s32 };
enum class Output : int { u8, bf16, f32 };

struct Call {
  const void* x;
  Input x_type;
  const float* scale;  // [channels] with s32, else null
  const float* bias;   // [channels] or null, with s32
  Activation activation;
  void* y;
  Output y_type;
  Quantisation quantisation;  // of a u8 y
  int64_t count;              // elements
  int64_t channels;           // with s32: the last dimension
};

struct Kernel {
  Isa isa;
  // Elements [begin, end), with s32 whole rows of channels. False if a value to be quantised is a
  // NaN: y is then undefined.
  bool (*elements)(const Call& call, int64_t begin, int64_t end);
};

extern const Kernel kScalar;
extern const Kernel kAvx2;
extern const Kernel kAvx512;

const Kernel& select();
// All elements, on the thread pool; false as above.
bool run(const Call& call);

}  // namespace fastrec::activation_quantize
