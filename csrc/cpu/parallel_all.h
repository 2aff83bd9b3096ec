// parallel_for of a body that may object.
#pragma once

#include <atomic>
#include <cstdint>

#include "parallel.h"

namespace fastrec {

// Whether body(begin, end) was true for every chunk; all are run, also after a false one.
template <class F>
bool parallel_all(int64_t count, int64_t grain, int threads, F&& body) {
  std::atomic<bool> all{true};
  parallel_for(count, grain, threads, [&](int64_t begin, int64_t end) {
    if (!body(begin, end)) all.store(false, std::memory_order_relaxed);
  });
  return all.load(std::memory_order_relaxed);
}

}  // namespace fastrec
