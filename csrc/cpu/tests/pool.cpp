// The thread pool, alone and with everything that may happen to it at once.
#include <sys/wait.h>
#include <unistd.h>

#include <atomic>
#include <chrono>
#include <thread>

#include "check.h"
#include "parallel.h"

namespace fastrec::tests {
namespace {

// Plain ints on purpose: ThreadSanitizer sees whether two threads ever had the same element, and
// whether the caller may read what the workers wrote.
void covers_once(int64_t count, int64_t grain, int threads) {
  std::vector<int> hits(static_cast<size_t>(count), 0);
  std::atomic<bool> chunks_fit{true};
  parallel_for(count, grain, threads, [&](int64_t begin, int64_t end) {
    // A caller that works alone gets everything at once.
    if (begin >= end || (end - begin > grain && end - begin != count)) chunks_fit = false;
    for (int64_t i = begin; i < end; ++i) ++hits[static_cast<size_t>(i)];
  });
  CHECK(chunks_fit);
  for (const int hit : hits) CHECK(hit == 1);
}

void covers_many(int rounds) {
  for (int round = 0; round < rounds; ++round)
    for (const int64_t count : {0, 1, 2, 3, 7, 64, 65, 1000})
      for (const int64_t grain : {1, 3, 64, 5000})
        for (const int threads : {1, 2, 3, 200}) covers_once(count, grain, threads);
}

}  // namespace

TEST(pool_covers_every_index_once) { covers_many(20); }

TEST(pool_serves_concurrent_callers) {
  std::vector<std::thread> callers;
  for (int i = 0; i < 4; ++i) callers.emplace_back([] { covers_many(5); });
  for (std::thread& caller : callers) caller.join();
}

TEST(pool_wakes_workers_that_sleep) {
  for (int round = 0; round < 20; ++round) {
    std::this_thread::sleep_for(std::chrono::milliseconds(2));  // beyond the time they spin
    covers_once(100000, 100, 8);
    covers_once(4, 1, 8);
  }
}

TEST(pool_shares_two_long_chunks_though_its_worker_sleeps) {
  if (max_threads() == 1) return;
  std::this_thread::sleep_for(std::chrono::milliseconds(20));  // beyond the time workers spin
  std::atomic<int> begun{0};
  auto run = [&](int64_t, int64_t) {
    ++begun;
    // Neither ends before the other has begun, unless no thread takes the other.
    const auto limit = std::chrono::steady_clock::now() + std::chrono::seconds(5);
    while (begun < 2 && std::chrono::steady_clock::now() < limit) std::this_thread::yield();
    CHECK(begun == 2);
  };
  parallel_for(2, 1, 2, run, 1'000'000);
}

TEST(pool_runs_nested_calls_alone) {
  std::vector<int> hits(64 * 64, 0);
  parallel_for(64, 1, 8, [&](int64_t begin, int64_t end) {
    for (int64_t i = begin; i < end; ++i) {
      const std::thread::id self = std::this_thread::get_id();
      parallel_for(64, 1, 8, [&](int64_t from, int64_t to) {
        CHECK(max_threads() == 1 || std::this_thread::get_id() == self || num_threads() == 1);
        for (int64_t j = from; j < to; ++j) ++hits[static_cast<size_t>(i * 64 + j)];
      });
    }
  });
  for (const int hit : hits) CHECK(hit == 1);
}

TEST(pool_honours_the_narrowest_setting) {
  const int most = max_threads();
  CHECK(num_threads() == most);
  follow_threads([] { return 1; });
  CHECK(num_threads() == 1);
  set_num_threads(1000);
  CHECK(num_threads() == most);
  const int before = exchange_call_threads(1);
  CHECK(before == 0 && num_threads() == 1);
  std::thread([most] { CHECK(num_threads() == most); }).join();
  CHECK(exchange_call_threads(0) == 1);
  set_num_threads(0);
  CHECK(num_threads() == 1);
  follow_threads(nullptr);
  CHECK(num_threads() == most);
}

TEST(pool_keeps_settings_apart_while_they_change) {
  std::atomic<bool> stop{false};
  std::thread changer([&] {
    for (int i = 0; !stop; ++i) {
      set_num_threads(i % 3);
      std::this_thread::yield();
    }
  });
  covers_many(5);
  stop = true;
  changer.join();
  set_num_threads(0);
}

#if !defined(__SANITIZE_THREAD__)  // it does not support threads made after a fork
TEST(pool_is_made_anew_after_a_fork) {
  covers_many(1);
  std::atomic<bool> stop{false};
  std::thread busy([&] {            // holds the pool in the parent at the moment of most forks
#if !defined(__SANITIZE_ADDRESS__)  // gcc 12's allocator may be locked for ever in the child
    while (!stop) covers_once(1000, 1, 8);
#endif
  });
  for (int i = 0; i < 10; ++i) {
    const pid_t child = fork();
    CHECK(child >= 0);
    if (child == 0) {
      covers_many(2);
      _exit(0);
    }
    int status = -1;
    CHECK(waitpid(child, &status, 0) == child);
    CHECK(WIFEXITED(status) && WEXITSTATUS(status) == 0);
  }
  stop = true;
  busy.join();
}
#endif

}  // namespace fastrec::tests
