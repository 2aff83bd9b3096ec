#include "parallel.h"

#include <pthread.h>
#include <sched.h>

#include <algorithm>
#include <atomic>
#include <chrono>
#include <memory>
#include <mutex>
#include <thread>
#include <vector>

namespace fastrec {
namespace {

// Long enough to bridge the Python and torch work between two layers of a request (5-50 us, several
// times that when caches are cold); waking a parked thread costs about 50 us on a virtual machine.
// Short beside the time slice of the scheduler and beside what other pools spin (ms).
constexpr auto kSpinTime = std::chrono::microseconds(300);
constexpr int kSpinsPerClockRead = 64;

void pause() {
#if defined(__x86_64__)
  __builtin_ia32_pause();
#endif
}

int cpus_allowed() {
  cpu_set_t set;
  if (sched_getaffinity(0, sizeof(set), &set) == 0) return std::max(1, CPU_COUNT(&set));
  return std::max(1u, std::thread::hardware_concurrency());
}

// Waits until `word` differs from `old`: spins first, then parks on a futex.
void wait_for_change(std::atomic<uint32_t>& word, uint32_t old) {
  const auto give_up = std::chrono::steady_clock::now() + kSpinTime;
  do {
    for (int i = 0; i < kSpinsPerClockRead; ++i) {
      if (word.load(std::memory_order_acquire) != old) return;
      pause();
    }
  } while (std::chrono::steady_clock::now() < give_up);
  word.wait(old, std::memory_order_acquire);
}

// Every participant owns a contiguous range, whose data it then finds in its own caches, and helps
// the others once that is done.
struct Job {
  static constexpr int kMaxRanges = 64;
  struct alignas(64) Range {
    std::atomic<int64_t> next{0};
    int64_t end = 0;
  };

  Job(ParallelBody body, void* context, int64_t count, int64_t grain, int ranges)
      : body(body), context(context), grain(grain), ranges(ranges) {
    for (int i = 0; i < ranges; ++i) {
      range[i].next.store(count * i / ranges, std::memory_order_relaxed);
      range[i].end = count * (i + 1) / ranges;
    }
  }

  void work() {
    const int own = joined.fetch_add(1, std::memory_order_relaxed);
    for (int i = 0; i < ranges; ++i) {
      Range& from = range[(own + i) % ranges];
      for (int64_t begin;
           (begin = from.next.fetch_add(grain, std::memory_order_relaxed)) < from.end;)
        body(context, begin, std::min(begin + grain, from.end));
    }
  }

  ParallelBody body;
  void* context;
  int64_t grain;
  int ranges;
  std::atomic<int> joined{0};
  Range range[kMaxRanges];
};

// Hands one job at a time to one thread. The word counts transitions, so that a waiter sees every
// change: idle -> posted -> running -> idle, or posted -> idle where the caller takes the job back.
class alignas(64) Worker {
 public:
  void start() {
    std::thread([this] { loop(); }).detach();
  }

  void post(Job* job) {
    job_ = job;
    ticket_.store(ticket_.load(std::memory_order_relaxed) - kIdle + kPosted + kStep,
                  std::memory_order_release);
    ticket_.notify_one();
  }

  // Takes the job back if it was not begun, else waits for its end.
  void finish() {
    uint32_t seen = ticket_.load(std::memory_order_acquire);
    if ((seen & kState) == kPosted &&
        ticket_.compare_exchange_strong(seen, seen - kPosted + kIdle, std::memory_order_acquire))
      return;
    while ((seen & kState) != kIdle) {
      wait_for_change(ticket_, seen);
      seen = ticket_.load(std::memory_order_acquire);
    }
  }

 private:
  static constexpr uint32_t kIdle = 0, kPosted = 1, kRunning = 2, kState = 3, kStep = 4;

  void loop() {
    for (;;) {
      uint32_t seen = ticket_.load(std::memory_order_acquire);
      if ((seen & kState) != kPosted) {
        wait_for_change(ticket_, seen);
        continue;
      }
      if (!ticket_.compare_exchange_strong(seen, seen - kPosted + kRunning,
                                           std::memory_order_acquire))
        continue;
      job_->work();
      ticket_.fetch_sub(kRunning - kIdle, std::memory_order_release);
      ticket_.notify_one();
    }
  }

  std::atomic<uint32_t> ticket_{kIdle};
  Job* job_ = nullptr;
};

class Pool {
 public:
  explicit Pool(int workers) {
    for (int i = 0; i < workers; ++i) {
      workers_.push_back(std::make_unique<Worker>());
      workers_.back()->start();
    }
  }

  int size() const { return static_cast<int>(workers_.size()); }

  void run(Job& job, int helpers) {
    for (int i = 0; i < helpers; ++i) workers_[i]->post(&job);
    job.work();
    for (int i = 0; i < helpers; ++i) workers_[i]->finish();
  }

 private:
  std::vector<std::unique_ptr<Worker>> workers_;
};

// Never destroyed: workers may outlive static destruction. Null in a forked child, where the
// parent's threads do not exist; the child makes its own pool on first use.
std::atomic<Pool*> pool{nullptr};
std::mutex pool_mutex;
std::atomic<int> thread_limit{0};

void forget_pool_in_child() {
  pool.store(nullptr);
  // The parent may have held the lock when it forked; no other thread exists here.
  new (&pool_mutex) std::mutex();
}

Pool* get_pool(int workers) {  // pool_mutex is held
  Pool* current = pool.load(std::memory_order_relaxed);
  if (current && current->size() >= workers) return current;
  static const int registered = pthread_atfork(nullptr, nullptr, forget_pool_in_child);
  (void)registered;
  // A grown pool replaces the smaller one, whose parked workers stay behind; this happens at most
  // once a process unless the affinity mask grows.
  current = new Pool(std::max(workers, max_threads() - 1));
  pool.store(current);
  return current;
}

}  // namespace

int max_threads() { return cpus_allowed(); }

int num_threads() {
  int limit = thread_limit.load(std::memory_order_relaxed);
  if (limit == 0) {
    limit = max_threads();
    thread_limit.store(limit, std::memory_order_relaxed);
  }
  return limit;
}

void set_num_threads(int threads) { thread_limit.store(std::clamp(threads, 1, max_threads())); }

void parallel_for(int64_t count, int64_t grain, int threads, ParallelBody body, void* context) {
  if (count <= 0) return;
  const int64_t chunks = (count + grain - 1) / grain;
  const int helpers =
      static_cast<int>(std::min<int64_t>({threads, num_threads(), chunks, Job::kMaxRanges})) - 1;
  if (helpers > 0) {
    std::unique_lock lock(pool_mutex, std::try_to_lock);
    if (lock.owns_lock()) {
      Job job(body, context, count, grain, helpers + 1);
      return get_pool(helpers)->run(job, helpers);
    }
  }
  body(context, 0, count);
}

}  // namespace fastrec
