// The one thread pool.
//
// Each thread works through a contiguous range of its own in chunks, then helps the others.
// A worker that has not started when the work is done is not waited for, so a busy machine costs
// speed, never a stall on a thread that the scheduler has put aside. Workers spin for a short while
// after a job, so that the next layer of the same request starts at once, then park, so that an
// idle process costs nothing and other pools in the process (OpenMP, TBB) are not starved. Parked
// workers are woken only for work that is worth it (parallel.cpp). A caller that finds the pool
// busy works alone: concurrent callers never oversubscribe the machine. So does a body that calls
// parallel_for itself. A forked child makes its own pool on first use.
#pragma once

#include <cstdint>
#include <type_traits>
#include <utility>

namespace fastrec {

// Number of threads, the caller's included, that a parallel_for of the calling thread uses at most:
// its own setting (exchange_call_threads), else the process's (set_num_threads), else what the
// followed source says (follow_threads), never more than max_threads(). 1 within a body.
int num_threads();
// CPUs that this process may use: its affinity mask, and the CPU quota of its control groups.
// Looked up at the first use, after a fork and by set_num_threads, not per call.
int max_threads();

// The process's setting; 0 forgets it.
void set_num_threads(int threads);
// The calling thread's setting, which outranks the process's; 0: none. Returns the one before.
int exchange_call_threads(int threads);
// Where nothing is set, calls use no more threads than source() returns at that moment: how torch's
// own setting is honoured. It must be safe in any thread, and cheap. Null: none.
using ThreadSource = int (*)();
void follow_threads(ThreadSource source);

// Calls body(context, begin, end) for chunks of at most `grain` that cover [0, count), on at most
// `threads` threads; returns when all is done. A body can't throw: an exception, which could only
// unwind past running workers, ends the process.
//
// chunk_ns: what a chunk takes, where the caller knows it; 0: it does not. Where workers sleep, a
// first chunk is otherwise run alone, to see whether waking them is worth it: of two long chunks
// that would leave nothing to share.
using ParallelBody = void (*)(void* context, int64_t begin, int64_t end) noexcept;
void parallel_for(int64_t count, int64_t grain, int threads, ParallelBody body, void* context,
                  int64_t chunk_ns = 0);

template <class F>
void parallel_for(int64_t count, int64_t grain, int threads, F&& body, int64_t chunk_ns = 0) {
  parallel_for(
      count, grain, threads,
      [](void* context, int64_t begin, int64_t end) noexcept {
        (*static_cast<std::remove_reference_t<F>*>(context))(begin, end);
      },
      &body, chunk_ns);
}

}  // namespace fastrec
