#include "int8_embedding_sum/int8_embedding_sum.h"

#if defined(__x86_64__)
#include "vec16_avx512.h"
// After the lanes it is written over.
#include "int8_embedding_sum/vectors.h"

namespace fastrec::int8_embedding_sum {
const Kernel kAvx512 = {Isa::avx512, gather};
}
#endif
