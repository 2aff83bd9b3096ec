#include "isa.h"

#if defined(__x86_64__)
#define FASTREC_LOOPS_TARGET __attribute__((target(FASTREC_TARGET_avx512)))
#include "engine/loops/body.h"

namespace fastrec::engine::loops {
const Loops kAvx512 = {Isa::avx512, map, reduce, cell};
}
#endif
