// parallel.h on the threads of the session that runs: a pool of our own beside ONNX Runtime's,
// whose idle threads keep their cores for a while, would fight with it.
#include "parallel.h"

#include <sched.h>

#include <algorithm>

#include "api.h"

namespace fastrec {
namespace {

// Of the kernel that runs in this thread; null beside it, and in the session's other threads, so
// that a body that calls parallel_for works alone.
thread_local OrtKernelContext* running = nullptr;

struct Job {
  ParallelBody body;
  void* context;
  int64_t count, grain;
};

}  // namespace

namespace onnxruntime {

Threads::Threads(OrtKernelContext* context) { running = context; }
Threads::~Threads() { running = nullptr; }

}  // namespace onnxruntime

// The API does not say how many threads a session has: the most that it may keep busy.
int max_threads() {
  static const int cpus = [] {
    cpu_set_t set;
    return sched_getaffinity(0, sizeof(set), &set) ? 1 : std::max(CPU_COUNT(&set), 1);
  }();
  return cpus;
}

int num_threads() { return running ? max_threads() : 1; }

void parallel_for(int64_t count, int64_t grain, int threads, ParallelBody body, void* context,
                  int64_t) {
  if (count <= 0) return;
  const int64_t chunks = (count + grain - 1) / grain;
  OrtKernelContext* const session = running;
  if (!session || threads <= 1 || chunks == 1) {
    body(context, 0, count);
    return;
  }
  Job job = {body, context, count, grain};
  running = nullptr;
  OrtStatus* const status = onnxruntime::api().KernelContext_ParallelFor(
      session,
      [](void* of, size_t chunk) {
        const Job& job = *static_cast<const Job*>(of);
        const int64_t begin = static_cast<int64_t>(chunk) * job.grain;
        job.body(job.context, begin, std::min(begin + job.grain, job.count));
      },
      static_cast<size_t>(chunks), static_cast<size_t>(chunks), &job);
  running = session;
  onnxruntime::check(status);
}

}  // namespace fastrec
