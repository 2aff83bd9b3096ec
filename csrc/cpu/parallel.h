// The one thread pool.
//
// Each thread works through a contiguous range of its own in chunks, then helps the others.
// A worker that has not started when the work is done is not waited for, so a busy machine costs
// speed, never a stall on a thread that the scheduler has put aside. Workers spin for a short while
// after a job, so that the next layer of the same request starts at once, then park, so that an
// idle process costs nothing and other pools in the process (OpenMP, TBB) are not starved. A caller
// that finds the pool busy works alone: concurrent callers never oversubscribe the machine.
#pragma once

#include <cstdint>

namespace fastrec {

// Number of threads, the caller's included, that parallel_for uses at most.
int num_threads();
// Clamped to [1, CPUs this process may run on].
void set_num_threads(int threads);
int max_threads();

// Calls body(context, begin, end) for chunks of at most `grain` that cover [0, count), on at most
// `threads` threads; returns when all is done.
using ParallelBody = void (*)(void* context, int64_t begin, int64_t end);
void parallel_for(int64_t count, int64_t grain, int threads, ParallelBody body, void* context);

template <class F>
void parallel_for(int64_t count, int64_t grain, int threads, F&& body) {
  parallel_for(
      count, grain, threads,
      [](void* context, int64_t begin, int64_t end) { (*static_cast<F*>(context))(begin, end); },
      &body);
}

}  // namespace fastrec
