// Every configuration of sparse_int8_linear's CUDA kernel, run by the emulator.
#include "emulator.h"
// The emulator first: it defines what kernels find in CUDA.
#include "sparse_int8_linear/sparse_int8_linear.cuh"

using namespace fastrec;
using namespace fastrec::sparse_int8_linear;

extern "C" int params_bytes() { return sizeof(Params); }

extern "C" int emulate(int index, const Params* params, unsigned seed) {
  int at = 0;
#define FASTREC_RUN(R, W, P, S, A, B, T)                                                    \
  if (index == at++)                                                                        \
    return emulated::run(                                                                   \
        static_cast<unsigned>(ceil_div(params->panels, P * W) * ceil_div(params->rows, R)), \
        block_threads(P, S, B), shared_bytes(R, W, P, S), seed,                             \
        [params] { multiply<R, W, P, S, A, B, T>(*params); });
  FASTREC_SPARSE_INT8_LINEAR(FASTREC_RUN)
#undef FASTREC_RUN
  return 0;
}
