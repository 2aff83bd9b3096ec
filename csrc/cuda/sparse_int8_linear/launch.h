#pragma once

#include <cuda_runtime_api.h>

#include "sparse_int8_linear/params.cuh"

namespace fastrec::sparse_int8_linear {

struct Configuration {
  int rows, wide, panels, slices, ahead, bands;
  bool two_four;
};

int configurations();
Configuration configuration(int index);

// Launches the configuration of that index on the current GPU. cudaErrorInvalidValue for an index
// that is none.
cudaError_t launch(int index, const Params& params, cudaStream_t stream);

}  // namespace fastrec::sparse_int8_linear
