#include "isa.h"

#if defined(__x86_64__)
#define FASTREC_LOOPS_TARGET __attribute__((target(FASTREC_TARGET_avx2)))
#include "engine/loops/body.h"

namespace fastrec::engine::loops {
const Loops kAvx2 = {Isa::avx2, map, reduce, cell};
}
#endif
