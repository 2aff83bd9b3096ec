#include "cpu_features.h"
#include "engine/loops/loops.h"

namespace fastrec::engine::loops {
namespace {

constexpr const Loops* kAll[] = {
#if defined(__x86_64__)
    &kAvx512,
    &kAvx2,
#endif
    &kScalar,
};

}  // namespace

const Loops& select() { return select_kernel(kAll); }

}  // namespace fastrec::engine::loops
