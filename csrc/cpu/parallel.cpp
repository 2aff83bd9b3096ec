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

// Long enough to bridge the Python and torch work between two layers of a request (5-50 us), short
// beside the time slice of the scheduler.
constexpr auto kSpinTime = std::chrono::microseconds(60);
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

class Pool {
 public:
  explicit Pool(int workers) {
    for (int i = 0; i < workers; ++i) {
      workers_.emplace_back(std::make_unique<Worker>());
      std::thread([worker = workers_.back().get()] { worker->loop(); }).detach();
    }
  }

  int size() const { return static_cast<int>(workers_.size()); }

  // Runs parts 1..parts-1 on the workers and part 0 here.
  void run(int parts, ParallelBody body, void* context) {
    for (int part = 1; part < parts; ++part)
      workers_[part - 1]->start({body, context, part, parts});
    body(context, 0, parts);
    for (int part = 1; part < parts; ++part) workers_[part - 1]->join();
  }

 private:
  struct Job {
    ParallelBody body;
    void* context;
    int part, parts;
  };

  struct alignas(64) Worker {
    std::atomic<uint32_t> started{0};
    alignas(64) std::atomic<uint32_t> finished{0};
    Job job{};

    void start(const Job& next) {
      job = next;
      started.fetch_add(1, std::memory_order_release);
      started.notify_one();
    }
    void join() {
      const uint32_t goal = started.load(std::memory_order_relaxed);
      for (uint32_t seen; (seen = finished.load(std::memory_order_acquire)) != goal;)
        wait_for_change(finished, seen);
    }
    void loop() {
      for (uint32_t seen = 0;;) {
        wait_for_change(started, seen);
        ++seen;
        job.body(job.context, job.part, job.parts);
        finished.fetch_add(1, std::memory_order_release);
        finished.notify_one();
      }
    }
  };

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

void parallel_for(int parts, ParallelBody body, void* context) {
  parts = std::min(parts, num_threads());
  if (parts > 1) {
    std::unique_lock lock(pool_mutex, std::try_to_lock);
    if (lock.owns_lock()) return get_pool(parts - 1)->run(parts, body, context);
  }
  body(context, 0, 1);
}

}  // namespace fastrec
