#include "ceilings.h"

#include <chrono>
#include <cstdint>

#include "cpu_features.h"

#if defined(__x86_64__)
#include <immintrin.h>
#endif

namespace fastrec {
namespace {

#if defined(__x86_64__)
constexpr int kChains =
    16;  // independent accumulators: 2 an instruction-cycle x latency 4, doubled
constexpr int64_t kOpsPerInstruction = 64 * 2;

// In assembly, because gcc 12 moves and spills the accumulators of the same loop in intrinsics.
__attribute__((target(FASTREC_TARGET_avx512vnni), noipa)) int32_t chains(int64_t rounds) {
  __m512i acc[kChains];
#pragma GCC unroll 16
  for (int i = 0; i < kChains; ++i) acc[i] = _mm512_set1_epi32(i);
  const __m512i a = _mm512_set1_epi8(3), b = _mm512_set1_epi8(5);
  for (int64_t r = 0; r < rounds; ++r) {
#pragma GCC unroll 16
    for (int i = 0; i < kChains; ++i)
      __asm__ volatile("vpdpbusd %2, %1, %0" : "+v"(acc[i]) : "v"(a), "v"(b));
  }
  __m512i sum = acc[0];
#pragma GCC unroll 16
  for (int i = 1; i < kChains; ++i) sum = _mm512_add_epi32(sum, acc[i]);
  return _mm512_reduce_add_epi32(sum);
}
#endif

}  // namespace

double vpdpbusd_peak_gops(double seconds) {
#if defined(__x86_64__)
  if (!machine_has(Isa::avx512vnni)) return 0.0;
  using Clock = std::chrono::steady_clock;
  constexpr int64_t kRounds = 20'000;
  // The best slice: the peak is what the core can do when nobody else is on it.
  double best = 0.0;
  volatile int32_t sink = 0;
  const auto end = Clock::now() + std::chrono::duration<double>(seconds);
  do {
    const auto start = Clock::now();
    sink = chains(kRounds);
    const double elapsed = std::chrono::duration<double>(Clock::now() - start).count();
    const double gops = kRounds * kChains * kOpsPerInstruction / elapsed * 1e-9;
    if (gops > best) best = gops;
  } while (Clock::now() < end);
  (void)sink;
  return best;
#else
  (void)seconds;
  return 0.0;
#endif
}

}  // namespace fastrec
