// Device code that kernels share. Headers named *.cuh compile under nvcc, under NVRTC (which has no
// host headers) and, for the tests, under a host compiler with FASTREC_EMULATED, where
// tests/kernels/gpu/emulator.h stands in for CUDA.
#pragma once

#include "types.cuh"

namespace fastrec {

inline constexpr int kWarp = 32;

__host__ __device__ constexpr int64_t ceil_div(int64_t a, int64_t b) { return (a + b - 1) / b; }

#if !defined(FASTREC_EMULATED)

// A block's dynamic shared memory.
__device__ __forceinline__ uint8_t* dynamic_shared() {
  extern __shared__ __align__(16) uint8_t fastrec_shared[];
  return fastrec_shared;
}

// Copies 16 bytes from global to shared memory; where `valid` is false, writes zeros and reads
// nothing.
__device__ __forceinline__ void copy_async_16(void* shared, const void* global, bool valid) {
  const uint32_t to = static_cast<uint32_t>(__cvta_generic_to_shared(shared));
  asm volatile("cp.async.cg.shared.global [%0], [%1], 16, %2;" ::"r"(to), "l"(global),
               "r"(valid ? 16 : 0)
               : "memory");
}

// The same for 4 bytes.
__device__ __forceinline__ void copy_async_4(void* shared, const void* global, bool valid) {
  const uint32_t to = static_cast<uint32_t>(__cvta_generic_to_shared(shared));
  asm volatile("cp.async.ca.shared.global [%0], [%1], 4, %2;" ::"r"(to), "l"(global),
               "r"(valid ? 4 : 0)
               : "memory");
}

__device__ __forceinline__ void copy_async_commit() {
  asm volatile("cp.async.commit_group;" ::: "memory");
}

// Waits until at most kPending of this thread's latest groups of copies are under way.
template <int kPending>
__device__ __forceinline__ void copy_async_wait() {
  asm volatile("cp.async.wait_group %0;" ::"n"(kPending) : "memory");
}

// d[16 x 8] += a[16 x 32] b[32 x 8], s8 by u8 in s32. With g = lane / 4 and t = lane % 4, a
// register holds 4 consecutive k of one row of a or one column of b, lowest byte first:
//   a[0..3]: row g, k 4t | row g + 8, k 4t | row g, k 16 + 4t | row g + 8, k 16 + 4t
//   b[0..1]: column g, k 4t | k 16 + 4t
//   d[0..3]: (g, 2t) | (g, 2t + 1) | (g + 8, 2t) | (g + 8, 2t + 1)
__device__ __forceinline__ void mma_s8_u8(int32_t (&d)[4], const uint32_t (&a)[4],
                                          const uint32_t (&b)[2]) {
  asm volatile(
      "mma.sync.aligned.m16n8k32.row.col.s32.s8.u8.s32 {%0, %1, %2, %3}, {%4, %5, %6, %7}, "
      "{%8, %9}, {%0, %1, %2, %3};"
      : "+r"(d[0]), "+r"(d[1]), "+r"(d[2]), "+r"(d[3])
      : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "r"(b[0]), "r"(b[1]));
}

// Metadata in rising order, which newer GPUs take at full speed; older compilers have one form.
#if __CUDACC_VER_MAJOR__ > 12 || (__CUDACC_VER_MAJOR__ == 12 && __CUDACC_VER_MINOR__ >= 5)
#define FASTREC_MMA_SP "mma.sp::ordered_metadata"
#else
#define FASTREC_MMA_SP "mma.sp"
#endif

// d[16 x 8] += a[16 x 64] b[64 x 8], where a keeps 2 of every 4 k, s8 by u8 in s32. A register of
// a holds what is kept of 8 consecutive k, of b 4 consecutive k, lowest byte first:
//   a[0..3]: row g, k 8t | row g + 8, k 8t | row g, k 32 + 8t | row g + 8, k 32 + 8t
//   b[0..3]: column g, k 4t | k 16 + 4t | k 32 + 4t | k 48 + 4t
//   meta:    row g + 8 (t % 2), k 32 (t / 2) on: 4 bits for every 4 k, the places of the two
__device__ __forceinline__ void mma_sp_s8_u8(int32_t (&d)[4], const uint32_t (&a)[4],
                                             const uint32_t (&b)[4], uint32_t meta) {
  asm volatile(FASTREC_MMA_SP
               ".sync.aligned.m16n8k64.row.col.s32.s8.u8.s32 {%0, %1, %2, %3}, {%4, %5, %6, %7}, "
               "{%8, %9, %10, %11}, {%0, %1, %2, %3}, %12, 0x0;"
               : "+r"(d[0]), "+r"(d[1]), "+r"(d[2]), "+r"(d[3])
               : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "r"(b[0]), "r"(b[1]), "r"(b[2]),
                 "r"(b[3]), "r"(meta));
}

#endif

template <int kBytes>
struct Word;
template <>
struct Word<4> {
  using Type = uint32_t;
};
template <>
struct Word<8> {
  using Type = uint2;
};
template <>
struct Word<16> {
  using Type = uint4;
};

// Stores the first `count` of four values, at once where all four count and `alignment`, in bytes,
// allows it.
template <typename T>
__device__ __forceinline__ void store_fours(T* to, const T (&values)[4], int64_t count,
                                            int alignment) {
  constexpr int kBytes = 4 * static_cast<int>(sizeof(T));
  if (count >= 4 && alignment >= kBytes) {
    typename Word<kBytes>::Type word;
    memcpy(&word, values, kBytes);
    *reinterpret_cast<typename Word<kBytes>::Type*>(to) = word;
  } else {
    for (int j = 0; j < 4; ++j)
      if (j < count) to[j] = values[j];
  }
}

}  // namespace fastrec
