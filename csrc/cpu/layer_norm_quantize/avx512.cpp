#include "layer_norm_quantize/layer_norm_quantize.h"

#if defined(__x86_64__)
#include "vec16_avx512.h"
// After the lanes it is written over.
#include "layer_norm_quantize/vectors.h"

namespace fastrec::layer_norm_quantize {
const Kernel kAvx512 = {Isa::avx512, rows};
}
#endif
