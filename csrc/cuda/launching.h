// Helpers of all launch.cu files.
#pragma once

#include <cuda_runtime_api.h>

#include <atomic>
#include <cstdint>

namespace fastrec {

// Allows one kernel more than 48 KB of shared memory a block, once on each GPU.
class LargeShared {
 public:
  cudaError_t allow(const void* kernel, int bytes) {
    if (bytes <= 48 * 1024) return cudaSuccess;
    int device = 0;
    if (const cudaError_t error = cudaGetDevice(&device)) return error;
    const uint64_t bit = device < 64 ? uint64_t{1} << device : 0;
    if (allowed_.load(std::memory_order_relaxed) & bit) return cudaSuccess;
    const cudaError_t error =
        cudaFuncSetAttribute(kernel, cudaFuncAttributeMaxDynamicSharedMemorySize, bytes);
    if (error == cudaSuccess) allowed_.fetch_or(bit, std::memory_order_relaxed);
    return error;
  }

 private:
  std::atomic<uint64_t> allowed_{0};
};

}  // namespace fastrec
