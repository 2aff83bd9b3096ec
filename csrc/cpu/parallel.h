// The one thread pool.
//
// Workers spin for a short while after a job, so that the next layer of the same request starts at
// once, then park, so that an idle process costs nothing and other thread pools in the process
// (OpenMP, TBB) are not starved. A caller that finds the pool busy runs its job alone: concurrent
// callers never oversubscribe the machine.
#pragma once

#include <cstdint>

namespace fastrec {

// Number of threads, the caller's included, that parallel_for uses at most.
int num_threads();
// Clamped to [1, CPUs this process may run on].
void set_num_threads(int threads);
int max_threads();

// body(context, part, parts) for part = 0 .. parts-1, parts <= num_threads(); returns when all are done.
using ParallelBody = void (*)(void* context, int part, int parts);
void parallel_for(int parts, ParallelBody body, void* context);

template <class F>
void parallel_for(int parts, F&& body) {
  parallel_for(
      parts, [](void* context, int part, int of) { (*static_cast<F*>(context))(part, of); }, &body);
}

}  // namespace fastrec
