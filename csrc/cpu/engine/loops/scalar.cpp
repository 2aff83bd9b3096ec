#define FASTREC_LOOPS_TARGET
#include "engine/loops/body.h"

namespace fastrec::engine::loops {
const Loops kScalar = {Isa::scalar, map, reduce, cell};
}
