#include "int8_embedding/int8_embedding.h"

#if defined(__x86_64__)
#include "vec16_avx2.h"
// After the lanes it is written over.
#include "int8_embedding/vectors.h"

namespace fastrec::int8_embedding {
const Kernel kAvx2 = {Isa::avx2, gather};
}
#endif
