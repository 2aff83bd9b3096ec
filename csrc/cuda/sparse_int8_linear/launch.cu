#include "launching.h"
#include "sparse_int8_linear/launch.h"
#include "sparse_int8_linear/sparse_int8_linear.cuh"

namespace fastrec::sparse_int8_linear {
namespace {

struct Entry {
  Configuration configuration;
  const void* kernel;
};

#define FASTREC_ENTRY(rows, wide, panels, slices, ahead, bands, two_four) \
  {{rows, wide, panels, slices, ahead, bands, two_four},                  \
   reinterpret_cast<const void*>(&multiply<rows, wide, panels, slices, ahead, bands, two_four>)},
const Entry kEntries[] = {FASTREC_SPARSE_INT8_LINEAR(FASTREC_ENTRY)};
#undef FASTREC_ENTRY
constexpr int kCount = sizeof(kEntries) / sizeof(kEntries[0]);
LargeShared large_shared[kCount];

}  // namespace

int configurations() { return kCount; }
Configuration configuration(int index) { return kEntries[index].configuration; }

cudaError_t launch(int index, const Params& params, cudaStream_t stream) {
  if (index < 0 || index >= kCount) return cudaErrorInvalidValue;
  if (params.rows == 0) return cudaSuccess;
  const Entry& entry = kEntries[index];
  const Configuration& c = entry.configuration;
  if (c.two_four != (params.meta != nullptr)) return cudaErrorInvalidValue;
  const int bytes = shared_bytes(c.rows, c.wide, c.panels, c.slices);
  if (const cudaError_t error = large_shared[index].allow(entry.kernel, bytes)) return error;
  const int64_t blocks = ceil_div(params.panels, c.panels * c.wide) * ceil_div(params.rows, c.rows);
  if (blocks > 0x7fffffff) return cudaErrorInvalidValue;
  Params copy = params;
  void* arguments[] = {&copy};
  return cudaLaunchKernel(entry.kernel, dim3(static_cast<unsigned>(blocks)),
                          dim3(block_threads(c.panels, c.slices, c.bands)), arguments, bytes,
                          stream);
}

}  // namespace fastrec::sparse_int8_linear
