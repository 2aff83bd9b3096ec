// This machine's measured limits: the denominators of every "% of peak".
#pragma once

#include <cstdint>

namespace fastrec {

// 10^9 multiply and add operations a second of one core running vpdpbusd on registers alone for
// about `seconds`; 0 where the CPU has no AVX-512 VNNI.
double vpdpbusd_peak_gops(double seconds);

// The same for fp32 fused multiply-adds on the widest registers there are; 0 without AVX2.
double fma_peak_gflops(double seconds);

// The same for vdpbf16ps (products of bf16 summed in fp32); 0 without AVX-512 BF16.
double bf16_peak_gflops(double seconds);

// 10^9 bytes a second that one core reads from a buffer of `buffer_bytes` (rounded up to 4 KiB)
// over and over for about `seconds`, with the widest loads it has: the rate of the cache level, or
// of the memory, that holds such a buffer. The best pass counts, over reading plainly and with
// software prefetch. 0 where `buffer_bytes` is not positive or can't be allocated.
double read_bandwidth_gbs(int64_t buffer_bytes, double seconds);

}  // namespace fastrec
