// Runs CUDA kernels of csrc/cuda on a CPU, for tests: threads of a block are fibers, matrix
// instructions and barriers are meetings of fibers, an asynchronous copy happens when it is waited
// for and not before, and shared memory begins as garbage. Fibers take turns in an order that a
// seed decides. What it can't show: timing, and races between two barriers that no order shows.
#pragma once

#include <ucontext.h>

#include <algorithm>
#include <bit>
#include <cmath>
#include <cstdint>
#include <cstdio>
#include <cstring>
#include <deque>
#include <functional>
#include <memory>
#include <random>
#include <vector>

#define FASTREC_EMULATED
#define __global__
#define __device__
#define __host__
#define __forceinline__ inline
#define __launch_bounds__(...)

namespace fastrec::emulated {

struct Index {
  unsigned x = 0, y = 0, z = 0;
};

struct Copy {
  void* to;
  const void* from;
  int bytes;
  bool valid;
};

// Of a fixed number of fibers; the last to come does the work for all.
struct Meeting {
  unsigned generation = 0;
  int present = 0;
};

struct Warp {
  Meeting meeting;
  int32_t* d[32];
  const uint32_t *a[32], *b[32];
  uint32_t meta[32];
};

struct Thread {
  ucontext_t context;
  std::unique_ptr<char[]> stack;
  Index thread, block;
  Warp* warp = nullptr;
  std::vector<Copy> open;
  std::deque<std::vector<Copy>> groups;
  const Meeting* waits = nullptr;
  unsigned generation = 0;
  bool done = false;
};

inline Thread* current = nullptr;
inline ucontext_t scheduler;
inline Meeting* block_meeting = nullptr;
inline int block_size = 0;
inline uint8_t* shared_memory = nullptr;
inline const std::function<void()>* body = nullptr;

template <typename Work>
void meet(Meeting& meeting, int size, Work work) {
  if (++meeting.present == size) {
    work();
    meeting.present = 0;
    ++meeting.generation;
    return;
  }
  Thread* const self = current;
  self->waits = &meeting;
  self->generation = meeting.generation;
  swapcontext(&self->context, &scheduler);
}

inline void begin() {
  (*body)();
  current->done = true;
  swapcontext(&current->context, &scheduler);
}

// False where threads wait for others that never come, or memory behind the block's is written to.
inline bool run_block(Index block, int threads, int shared_bytes, std::mt19937& random) {
  constexpr int kGuard = 256, kStack = 64 * 1024;
  std::vector<uint64_t> memory((shared_bytes + kGuard) / 8 + 1, 0xcdcdcdcdcdcdcdcdu);
  shared_memory = reinterpret_cast<uint8_t*>(memory.data());
  Meeting meeting;
  block_meeting = &meeting;
  block_size = threads;
  std::vector<Warp> warps((threads + 31) / 32);
  std::vector<Thread> all(threads);
  std::vector<int> order(threads);
  for (int i = 0; i < threads; ++i) {
    Thread& thread = all[i];
    order[i] = i;
    thread.thread.x = i;
    thread.block = block;
    thread.warp = &warps[i / 32];
    thread.stack.reset(new char[kStack]);
    getcontext(&thread.context);
    thread.context.uc_stack.ss_sp = thread.stack.get();
    thread.context.uc_stack.ss_size = kStack;
    thread.context.uc_link = nullptr;
    makecontext(&thread.context, begin, 0);
  }
  for (int left = threads; left > 0;) {
    bool moved = false;
    std::shuffle(order.begin(), order.end(), random);
    for (const int i : order) {
      Thread& thread = all[i];
      if (thread.done || (thread.waits && thread.waits->generation == thread.generation)) continue;
      thread.waits = nullptr;
      current = &thread;
      swapcontext(&scheduler, &thread.context);
      left -= thread.done;
      moved = true;
    }
    if (!moved) return false;
  }
  return std::all_of(shared_memory + shared_bytes, shared_memory + shared_bytes + kGuard,
                     [](uint8_t byte) { return byte == 0xcd; });
}

// All blocks, in a shuffled order.
inline bool run(unsigned blocks, int threads, int shared_bytes, unsigned seed,
                const std::function<void()>& kernel) {
  std::mt19937 random(seed);
  body = &kernel;
  std::vector<unsigned> order(blocks);
  for (unsigned i = 0; i < blocks; ++i) order[i] = i;
  std::shuffle(order.begin(), order.end(), random);
  for (const unsigned block : order)
    if (!run_block({block}, threads, shared_bytes, random)) return false;
  return true;
}

}  // namespace fastrec::emulated

#define threadIdx (fastrec::emulated::current->thread)
#define blockIdx (fastrec::emulated::current->block)

struct uint2 {
  unsigned x, y;
};
struct alignas(16) uint4 {
  unsigned x, y, z, w;
};

template <typename T>
T __ldg(const T* from) {
  return *from;
}
inline float __fmul_rn(float a, float b) { return a * b; }
inline float __fadd_rn(float a, float b) { return a + b; }
inline float __fdiv_rn(float a, float b) { return a / b; }
inline int __float2int_rn(float a) { return static_cast<int>(std::nearbyintf(a)); }
inline float __uint_as_float(unsigned bits) { return std::bit_cast<float>(bits); }
inline unsigned __float_as_uint(float value) { return std::bit_cast<unsigned>(value); }
using std::memcpy;

inline void __syncthreads() {
  fastrec::emulated::meet(*fastrec::emulated::block_meeting, fastrec::emulated::block_size, [] {});
}

namespace fastrec {

inline uint8_t* dynamic_shared() { return emulated::shared_memory; }

inline void copy_async(void* to, const void* from, int bytes, bool valid) {
  if (reinterpret_cast<uintptr_t>(to) % bytes ||
      (valid && reinterpret_cast<uintptr_t>(from) % bytes))
    std::fprintf(stderr, "a copy of %d bytes is not aligned\n", bytes), std::abort();
  emulated::current->open.push_back({to, from, bytes, valid});
}
inline void copy_async_16(void* to, const void* from, bool valid) {
  copy_async(to, from, 16, valid);
}
inline void copy_async_4(void* to, const void* from, bool valid) { copy_async(to, from, 4, valid); }
inline void copy_async_commit() {
  emulated::current->groups.push_back(std::move(emulated::current->open));
  emulated::current->open.clear();
}
template <int kPending>
void copy_async_wait() {
  auto& groups = emulated::current->groups;
  for (; groups.size() > kPending; groups.pop_front())
    for (const emulated::Copy& copy : groups.front()) {
      if (copy.valid)
        std::memcpy(copy.to, copy.from, copy.bytes);
      else
        std::memset(copy.to, 0, copy.bytes);
    }
}

inline int signed_byte(uint32_t word, int i) { return static_cast<int8_t>(word >> (8 * i)); }
inline int unsigned_byte(uint32_t word, int i) { return static_cast<uint8_t>(word >> (8 * i)); }

// mma.sync.m16n8k32.s32.s8.u8.s32 after the PTX manual's tables of fragments: element i of 16 of a
// lane's A is row g (+ 8 where i / 4 is odd), column 4 t + i % 4 (+ 16 from i = 8 on); element i of
// 8 of its B is row 4 t + i % 4 (+ 16 from i = 4 on), column g; element i of 4 of its D is row g
// (+ 8 from i = 2 on), column 2 t + i % 2.
inline void mma_s8_u8(int32_t (&d)[4], const uint32_t (&a)[4], const uint32_t (&b)[2]) {
  emulated::Warp& warp = *emulated::current->warp;
  const int lane = threadIdx.x % 32;
  warp.d[lane] = d, warp.a[lane] = a, warp.b[lane] = b;
  emulated::meet(warp.meeting, 32, [&warp] {
    int left[16][32], right[32][8];
    for (int l = 0; l < 32; ++l) {
      const int g = l / 4, t = l % 4;
      for (int i = 0; i < 16; ++i)
        left[g + i / 4 % 2 * 8][4 * t + i % 4 + i / 8 * 16] = signed_byte(warp.a[l][i / 4], i % 4);
      for (int i = 0; i < 8; ++i)
        right[4 * t + i % 4 + i / 4 * 16][g] = unsigned_byte(warp.b[l][i / 4], i % 4);
    }
    for (int l = 0; l < 32; ++l)
      for (int i = 0; i < 4; ++i) {
        const int row = l / 4 + i / 2 * 8, column = l % 4 * 2 + i % 2;
        for (int k = 0; k < 32; ++k) warp.d[l][i] += left[row][k] * right[k][column];
      }
  });
}

// mma.sp.m16n8k64 after the manual's: element i of 16 of a lane's A is row g (+ 8 where i / 4 is
// odd); elements 4 j .. 4 j + 3 are what is kept, in order, of the 8 columns from 8 t (+ 32 from
// i = 8 on); element i of 16 of its B is row 4 t + i % 4 + i / 4 * 16, column g. The metadata of
// row r, columns 32 c on is that of lane 4 (r % 8) + r / 8 + 2 c: of every 4 columns, two places of
// 2 bits, the lower first.
inline void mma_sp_s8_u8(int32_t (&d)[4], const uint32_t (&a)[4], const uint32_t (&b)[4],
                         uint32_t meta) {
  emulated::Warp& warp = *emulated::current->warp;
  const int lane = threadIdx.x % 32;
  warp.d[lane] = d, warp.a[lane] = a, warp.b[lane] = b, warp.meta[lane] = meta;
  emulated::meet(warp.meeting, 32, [&warp] {
    int left[16][64] = {}, right[64][8];
    for (int l = 0; l < 32; ++l) {
      const int g = l / 4, t = l % 4;
      for (int i = 0; i < 16; ++i) {
        right[4 * t + i % 4 + i / 4 * 16][g] = unsigned_byte(warp.b[l][i / 4], i % 4);
        const int row = g + i / 4 % 2 * 8, four = 2 * t + i % 4 / 2 + i / 8 * 8;
        const uint32_t word = warp.meta[row % 8 * 4 + row / 8 + four / 8 * 2] >> (four % 8 * 4);
        const int first = word & 3, second = word >> 2 & 3;
        if (first >= second) std::fprintf(stderr, "places do not rise\n"), std::abort();
        left[row][four * 4 + (i % 2 ? second : first)] = signed_byte(warp.a[l][i / 4], i % 4);
      }
    }
    for (int l = 0; l < 32; ++l)
      for (int i = 0; i < 4; ++i) {
        const int row = l / 4 + i / 2 * 8, column = l % 4 * 2 + i % 2;
        for (int k = 0; k < 64; ++k) warp.d[l][i] += left[row][k] * right[k][column];
      }
  });
}

}  // namespace fastrec
