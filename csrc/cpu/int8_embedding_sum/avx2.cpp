#include "int8_embedding_sum/int8_embedding_sum.h"

#if defined(__x86_64__)
#include "vec16_avx2.h"
// After the lanes it is written over.
#include "int8_embedding_sum/vectors.h"

namespace fastrec::int8_embedding_sum {
const Kernel kAvx2 = {Isa::avx2, gather};
}
#endif
