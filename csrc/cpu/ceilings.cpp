#include "ceilings.h"

#include <algorithm>
#include <chrono>
#include <cstdint>
#include <cstdlib>
#include <cstring>
#include <memory>

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

// Buffers are read in blocks of this size, one loop iteration each.
constexpr int64_t kReadBlock = 512;
constexpr int64_t kPageBytes = 4096;

// Each reads [from, from + bytes) once; `ahead` bytes further on are prefetched unless it is 0.
using Read = uint64_t (*)(const char* from, int64_t bytes, int64_t ahead);

__attribute__((noipa)) uint64_t read_scalar(const char* from, int64_t bytes, int64_t) {
  uint64_t lanes[8] = {}, word[8];
  for (int64_t at = 0; at < bytes; at += sizeof(word)) {
    std::memcpy(word, from + at, sizeof(word));
    for (int i = 0; i < 8; ++i) lanes[i] |= word[i];
  }
  return lanes[0] | lanes[1] | lanes[2] | lanes[3] | lanes[4] | lanes[5] | lanes[6] | lanes[7];
}

#if defined(__x86_64__)
// The loads are assembly so that the compiler drops none.
__attribute__((target(FASTREC_TARGET_avx2), noipa)) uint64_t read_avx2(const char* from,
                                                                       int64_t bytes,
                                                                       int64_t ahead) {
  for (const char* at = from; at < from + bytes; at += kReadBlock) {
    if (ahead)
#pragma GCC unroll 8
      for (int i = 0; i < kReadBlock; i += 64) _mm_prefetch(at + ahead + i, _MM_HINT_T0);
    __m256i lane[4];
#pragma GCC unroll 16
    for (int i = 0; i < kReadBlock / 32; ++i)
      __asm__ volatile("vmovdqu %1, %0"
                       : "=x"(lane[i % 4])
                       : "m"(*reinterpret_cast<const __m256i_u*>(at + i * 32)));
  }
  return 0;
}

__attribute__((target(FASTREC_TARGET_avx512), noipa)) uint64_t read_avx512(const char* from,
                                                                           int64_t bytes,
                                                                           int64_t ahead) {
  for (const char* at = from; at < from + bytes; at += kReadBlock) {
    if (ahead)
#pragma GCC unroll 8
      for (int i = 0; i < kReadBlock; i += 64) _mm_prefetch(at + ahead + i, _MM_HINT_T0);
    __m512i lane[4];
#pragma GCC unroll 8
    for (int i = 0; i < kReadBlock / 64; ++i)
      __asm__ volatile("vmovdqu64 %1, %0"
                       : "=v"(lane[i % 4])
                       : "m"(*reinterpret_cast<const __m512i_u*>(at + i * 64)));
  }
  return 0;
}
#endif

Read best_read() {
#if defined(__x86_64__)
  if (machine_has(Isa::avx512)) return read_avx512;
  if (machine_has(Isa::avx2)) return read_avx2;
#endif
  return read_scalar;
}

}  // namespace

double read_bandwidth_gbs(int64_t buffer_bytes, double seconds) {
  using Clock = std::chrono::steady_clock;
  if (buffer_bytes <= 0) return 0.0;
  const int64_t bytes = (buffer_bytes + kPageBytes - 1) / kPageBytes * kPageBytes;
  struct Free {
    void operator()(void* memory) const { std::free(memory); }
  };
  const std::unique_ptr<char, Free> buffer(
      static_cast<char*>(std::aligned_alloc(kPageBytes, static_cast<size_t>(bytes))));
  if (!buffer) return 0.0;
  // Written, so that every page has memory of its own.
  std::memset(buffer.get(), 1, static_cast<size_t>(bytes));

  // Slices of about 0.1 ms at cache speed: long beside the clock, short beside a time slice.
  constexpr int64_t kSliceBytes = 8 << 20;
  const int64_t passes = std::max<int64_t>(1, kSliceBytes / bytes);
  const Read read = best_read();
  volatile uint64_t sink = 0;
  double best = 0.0;
  const auto end = Clock::now() + std::chrono::duration<double>(seconds);
  do {
    for (const int64_t ahead : {0, 1024, 4096}) {
      const auto start = Clock::now();
      for (int64_t pass = 0; pass < passes; ++pass) sink = read(buffer.get(), bytes, ahead);
      const double elapsed = std::chrono::duration<double>(Clock::now() - start).count();
      best = std::max(best, static_cast<double>(passes * bytes) / elapsed * 1e-9);
    }
  } while (Clock::now() < end);
  (void)sink;
  return best;
}

double vpdpbusd_peak_gops(double seconds) {
#if defined(__x86_64__)
  if (!machine_has(Isa::avx512vnni)) return 0.0;
  using Clock = std::chrono::steady_clock;
  constexpr int64_t kRounds = 20'000;
  // The best slice: the peak is the core's rate while no other process runs on it.
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
