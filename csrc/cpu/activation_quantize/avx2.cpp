#include "activation_quantize/activation_quantize.h"

#if defined(__x86_64__)
#include "vec16_avx2.h"
// After the lanes it is written over.
#include "activation_quantize/vectors.h"

namespace fastrec::activation_quantize {
const Kernel kAvx2 = {Isa::avx2, elements};
}
#endif
