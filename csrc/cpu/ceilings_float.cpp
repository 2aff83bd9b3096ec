// The floating-point peaks of ceilings.h.
#include <chrono>
#include <cstdint>

#include "ceilings.h"
#include "cpu_features.h"

#if defined(__x86_64__)
#include <immintrin.h>
#endif

namespace fastrec {
namespace {

// Runs `rounds` rounds on registers alone; the operations of one round are given beside it.
using Loop = void (*)(int64_t rounds);

constexpr int kMultiplyAdd = 2;

#if defined(__x86_64__)
// Independent accumulators: more than 2 an instruction-cycle x latency 6. In assembly, because gcc
// 12 moves and spills the accumulators of the same loop in intrinsics.
constexpr int kChains512 = 16;
constexpr int kChains256 = 13;  // 16 registers, two of them operands

__attribute__((target(FASTREC_TARGET_avx2), noipa)) void fma_avx2(int64_t rounds) {
  __m256 acc[kChains256];
#pragma GCC unroll 16
  for (int i = 0; i < kChains256; ++i) acc[i] = _mm256_set1_ps(static_cast<float>(i));
  const __m256 a = _mm256_set1_ps(0.5f), b = _mm256_set1_ps(0.25f);
  for (int64_t r = 0; r < rounds; ++r) {
#pragma GCC unroll 16
    for (int i = 0; i < kChains256; ++i)
      __asm__ volatile("vfmadd231ps %2, %1, %0" : "+x"(acc[i]) : "x"(a), "x"(b));
  }
}

__attribute__((target(FASTREC_TARGET_avx512), noipa)) void fma_avx512(int64_t rounds) {
  __m512 acc[kChains512];
#pragma GCC unroll 16
  for (int i = 0; i < kChains512; ++i) acc[i] = _mm512_set1_ps(static_cast<float>(i));
  const __m512 a = _mm512_set1_ps(0.5f), b = _mm512_set1_ps(0.25f);
  for (int64_t r = 0; r < rounds; ++r) {
#pragma GCC unroll 16
    for (int i = 0; i < kChains512; ++i)
      __asm__ volatile("vfmadd231ps %2, %1, %0" : "+v"(acc[i]) : "v"(a), "v"(b));
  }
}

__attribute__((target(FASTREC_TARGET_avx512bf16), noipa)) void dot_bf16(int64_t rounds) {
  __m512 acc[kChains512];
#pragma GCC unroll 16
  for (int i = 0; i < kChains512; ++i) acc[i] = _mm512_set1_ps(static_cast<float>(i));
  const __m512i a = _mm512_set1_epi16(0x3f00), b = _mm512_set1_epi16(0x3e80);  // 0.5, 0.25
  for (int64_t r = 0; r < rounds; ++r) {
#pragma GCC unroll 16
    for (int i = 0; i < kChains512; ++i)
      __asm__ volatile("vdpbf16ps %2, %1, %0" : "+v"(acc[i]) : "v"(a), "v"(b));
  }
}
#endif

// 10^9 operations a second in the best slice: the peak is the core's rate while no other process is
// on it.
double best_slice(Loop loop, int64_t operations_a_round, double seconds) {
  using Clock = std::chrono::steady_clock;
  constexpr int64_t kRounds = 20'000;
  double best = 0.0;
  const auto end = Clock::now() + std::chrono::duration<double>(seconds);
  do {
    const auto start = Clock::now();
    loop(kRounds);
    const double elapsed = std::chrono::duration<double>(Clock::now() - start).count();
    const double gops = static_cast<double>(kRounds * operations_a_round) / elapsed * 1e-9;
    if (gops > best) best = gops;
  } while (Clock::now() < end);
  return best;
}

}  // namespace

double fma_peak_gflops(double seconds) {
#if defined(__x86_64__)
  if (machine_has(Isa::avx512))
    return best_slice(fma_avx512, kChains512 * 16 * kMultiplyAdd, seconds);
  if (machine_has(Isa::avx2)) return best_slice(fma_avx2, kChains256 * 8 * kMultiplyAdd, seconds);
#endif
  (void)seconds;
  return 0.0;
}

double bf16_peak_gflops(double seconds) {
#if defined(__x86_64__)
  if (machine_has(Isa::avx512bf16))
    return best_slice(dot_bf16, kChains512 * 32 * kMultiplyAdd, seconds);
#endif
  (void)seconds;
  return 0.0;
}

}  // namespace fastrec
