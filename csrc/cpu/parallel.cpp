#include "parallel.h"

#include <pthread.h>
#include <sched.h>
#include <sys/types.h>
#include <unistd.h>

#include <algorithm>
#include <atomic>
#include <chrono>
#include <memory>
#include <thread>
#include <vector>

#include "cgroup.h"

namespace fastrec {
namespace {

using Clock = std::chrono::steady_clock;

// Long enough to bridge the Python and torch work between two layers of a request (5-50 us, several
// times that when caches are cold). Short beside the time slice of the scheduler and beside what
// other pools spin (ms). After the first part the core is offered to other threads: torch's
// OpenMP threads, which would otherwise share it with a spinning worker.
constexpr auto kSpinTime = std::chrono::microseconds(300);
constexpr auto kSpinAlone = std::chrono::microseconds(50);
constexpr int kSpinsPerClockRead = 64;
// Measured on a virtual machine: waking a parked thread takes 20 us of the caller and the thread
// starts after 50 us. Work that takes one thread less than this gains nothing.
constexpr auto kWorthWaking = std::chrono::microseconds(60);

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
void wait_for_change(std::atomic<uint32_t>& word, uint32_t old, std::atomic<bool>& parked) {
  const auto begin = Clock::now();
  for (auto waited = Clock::duration::zero(); waited < kSpinTime; waited = Clock::now() - begin) {
    if (waited > kSpinAlone) sched_yield();
    for (int i = 0; i < kSpinsPerClockRead; ++i) {
      if (word.load(std::memory_order_acquire) != old) return;
      pause();
    }
  }
  parked.store(true, std::memory_order_relaxed);
  word.wait(old, std::memory_order_acquire);
  parked.store(false, std::memory_order_relaxed);
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

  // One chunk of that range; false if none is left.
  bool step(Range& from) {
    const int64_t begin = from.next.fetch_add(grain, std::memory_order_relaxed);
    if (begin >= from.end) return false;
    body(context, begin, std::min(begin + grain, from.end));
    return true;
  }

  // Range 0 is the caller's own.
  void work(int own) {
    for (int i = 0; i < ranges; ++i)
      while (step(range[(own + i) % ranges])) {
      }
  }

  void help() { work(joined.fetch_add(1, std::memory_order_relaxed)); }

  ParallelBody body;
  void* context;
  int64_t grain;
  int ranges;
  std::atomic<int> joined{1};
  Range range[kMaxRanges];
};

// True while this thread runs a body beside others: what that starts in turn runs alone.
thread_local bool inside_body = false;

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

  // Linux likes to place a woken thread on its waker's core, where it would wait for the waker to
  // finish: this worker may use any core of the caller but the one that the caller is on. (A caller
  // bound to that one core leaves no other: then nothing is changed.)
  void keep_off(int cpu) {
    const pid_t thread = thread_.load(std::memory_order_relaxed);
    if (cpu < 0 || cpu == kept_off_ || thread == 0) return;
    cpu_set_t allowed;
    if (sched_getaffinity(0, sizeof(allowed), &allowed) != 0) return;
    CPU_CLR(cpu, &allowed);
    if (CPU_COUNT(&allowed) == 0) return;
    sched_setaffinity(thread, sizeof(allowed), &allowed);
    kept_off_ = cpu;
  }

  bool parked() const { return parked_.load(std::memory_order_relaxed); }

  // Takes the job back if it was not begun, else waits for its end.
  void finish() {
    uint32_t seen = ticket_.load(std::memory_order_acquire);
    if ((seen & kState) == kPosted &&
        ticket_.compare_exchange_strong(seen, seen - kPosted + kIdle, std::memory_order_acquire))
      return;
    std::atomic<bool> caller_parked;
    while ((seen & kState) != kIdle) {
      wait_for_change(ticket_, seen, caller_parked);
      seen = ticket_.load(std::memory_order_acquire);
    }
  }

 private:
  static constexpr uint32_t kIdle = 0, kPosted = 1, kRunning = 2, kState = 3, kStep = 4;

  void loop() {
    inside_body = true;
    thread_.store(gettid(), std::memory_order_relaxed);
    for (;;) {
      uint32_t seen = ticket_.load(std::memory_order_acquire);
      if ((seen & kState) != kPosted) {
        wait_for_change(ticket_, seen, parked_);
        continue;
      }
      if (!ticket_.compare_exchange_strong(seen, seen - kPosted + kRunning,
                                           std::memory_order_acquire))
        continue;
      job_->help();
      ticket_.fetch_sub(kRunning - kIdle, std::memory_order_release);
      ticket_.notify_one();
    }
  }

  std::atomic<uint32_t> ticket_{kIdle};
  std::atomic<bool> parked_{false};
  std::atomic<pid_t> thread_{0};
  int kept_off_ = -1;  // read and written by the thread that holds the pool
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

  void run(Job& job, int helpers, int64_t chunks, int64_t chunk_ns) {
    int awake = 0;
    while (awake < helpers && !workers_[awake]->parked()) ++awake;
    if (awake < helpers && !worth_waking(job, chunks, chunk_ns)) helpers = awake;
    const int cpu = helpers > 0 ? sched_getcpu() : -1;
    for (int i = 0; i < helpers; ++i) {
      workers_[i]->keep_off(cpu);
      workers_[i]->post(&job);
    }
    job.work(0);
    for (int i = 0; i < helpers; ++i) workers_[i]->finish();
  }

 private:
  // A lone small call should not pay for a wake-up that comes too late to help, while a chain of
  // small calls should have its workers after the first few: so calls in close succession add up.
  bool worth_waking(Job& job, int64_t chunks, int64_t chunk_ns) {
    const auto begin = Clock::now();
    // The time of all work on one thread: given by the caller, or measured on the first chunk.
    if (chunk_ns == 0) job.step(job.range[0]);
    const auto chunk =
        chunk_ns ? Clock::duration(std::chrono::nanoseconds(chunk_ns)) : Clock::now() - begin;
    if (begin - last_asleep_ > kSpinTime) asleep_time_ = Clock::duration::zero();
    const auto expected = chunk * chunks;
    asleep_time_ += expected;
    last_asleep_ = begin + expected;
    return asleep_time_ >= kWorthWaking;
  }

  std::vector<std::unique_ptr<Worker>> workers_;
  // Of the calls that found workers asleep.
  Clock::duration asleep_time_{};
  Clock::time_point last_asleep_{};
};

// Never destroyed: workers may outlive static destruction. Null in a forked child, where the
// parent's threads do not exist.
std::atomic<Pool*> pool{nullptr};
std::atomic<bool> pool_busy{false};

std::atomic<int> machine_limit{0};  // 0: to be looked up
std::atomic<int> process_setting{0};
std::atomic<ThreadSource> followed{nullptr};
thread_local int call_setting = 0;

void forget_parent() {
  pool.store(nullptr);
  pool_busy.store(false);  // after a fork no other thread exists here
  machine_limit.store(0);
}

[[maybe_unused]] const int registered = pthread_atfork(nullptr, nullptr, forget_parent);

Pool* get_pool(int workers) {  // the caller has set pool_busy
  Pool* current = pool.load(std::memory_order_relaxed);
  if (current && current->size() >= workers) return current;
  // A grown pool replaces the smaller one, whose parked workers stay behind; this happens at most
  // once a process unless the affinity mask grows.
  current = new Pool(std::max(workers, max_threads() - 1));
  pool.store(current);
  return current;
}

}  // namespace

int max_threads() {
  int limit = machine_limit.load(std::memory_order_relaxed);
  if (limit == 0) {
    limit = cpus_allowed();
    if (const int quota = cgroup_cpus(read_file)) limit = std::min(limit, quota);
    machine_limit.store(limit, std::memory_order_relaxed);
  }
  return limit;
}

int num_threads() {
  if (inside_body) return 1;
  int wanted = call_setting;
  if (wanted == 0) wanted = process_setting.load(std::memory_order_relaxed);
  if (wanted == 0)
    if (const ThreadSource source = followed.load(std::memory_order_relaxed)) wanted = source();
  return wanted <= 0 ? max_threads() : std::min(wanted, max_threads());
}

void set_num_threads(int threads) {
  machine_limit.store(0);
  process_setting.store(std::max(threads, 0));
}

int exchange_call_threads(int threads) { return std::exchange(call_setting, threads); }

void follow_threads(ThreadSource source) { followed.store(source); }

void parallel_for(int64_t count, int64_t grain, int threads, ParallelBody body, void* context,
                  int64_t chunk_ns) {
  if (count <= 0) return;
  const int64_t chunks = (count + grain - 1) / grain;
  if (threads > 1 && chunks > 1 && !inside_body) {
    const int helpers =
        static_cast<int>(std::min<int64_t>({threads, num_threads(), chunks, Job::kMaxRanges})) - 1;
    if (helpers > 0 && !pool_busy.exchange(true, std::memory_order_acquire)) {
      Job job(body, context, count, grain, helpers + 1);
      inside_body = true;
      get_pool(helpers)->run(job, helpers, chunks, chunk_ns);
      inside_body = false;
      pool_busy.store(false, std::memory_order_release);
      return;
    }
  }
  body(context, 0, count);
}

}  // namespace fastrec
