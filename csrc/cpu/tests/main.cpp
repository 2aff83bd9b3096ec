#include <signal.h>
#include <sys/mman.h>
#include <unistd.h>

#include <cmath>
#include <limits>

#include "check.h"
#include "cpu_features.h"
#include "parallel.h"

namespace fastrec::tests {

char setting[256] = "";

std::vector<Test>& tests() {
  static std::vector<Test> all;
  return all;
}

namespace {

size_t page() { return static_cast<size_t>(sysconf(_SC_PAGESIZE)); }
size_t pages_for(size_t bytes) { return (bytes + page() - 1) / page() * page(); }

// The system calls alone are safe here; the default action then ends the process.
void say_where(int) {
  const char text[] = "memory outside a buffer was touched: ";
  [[maybe_unused]] ssize_t written = write(2, text, sizeof(text) - 1);
  written = write(2, setting, strnlen(setting, sizeof(setting)));
  written = write(2, "\n", 1);
}

}  // namespace

void* place_bytes(size_t bytes, Place place) {
  if (place == Place::heap) {
    void* data = ::operator new(bytes);
    std::memset(data, 0xff, bytes);
    return data;
  }
  const size_t inside = pages_for(bytes);
  void* map = mmap(nullptr, inside + 2 * page(), PROT_NONE, MAP_PRIVATE | MAP_ANONYMOUS, -1, 0);
  CHECK(map != MAP_FAILED);
  char* begin = static_cast<char*>(map) + page();
  CHECK(inside == 0 || mprotect(begin, inside, PROT_READ | PROT_WRITE) == 0);
  std::memset(begin, 0xff, inside);
  return place == Place::after_guard ? begin : begin + inside - bytes;
}

void release_bytes(void* data, size_t bytes, Place place) {
  if (place == Place::heap) return ::operator delete(data);
  const size_t inside = pages_for(bytes);
  char* begin = static_cast<char*>(data) - (place == Place::after_guard ? 0 : inside - bytes);
  // Bytes of the mapping that are not the buffer's must be as they were.
  for (char* at = begin; at < begin + inside; ++at)
    CHECK((at >= data && at < static_cast<char*>(data) + bytes) || *at == '\xff');
  munmap(begin - page(), inside + 2 * page());
}

void for_every_setting(const std::string& what, const std::function<void(Place)>& body) {
  const Isa before = active_isa();
  for (const IsaInfo& info : kIsaTable) {
    if (!machine_has(info.isa)) continue;
    force_isa(info.isa);
    for (const Place place : {Place::heap, Place::before_guard, Place::after_guard})
      for (const int threads : {1, 4}) {
        const int outer = exchange_call_threads(threads);
        std::snprintf(setting, sizeof(setting), "%s, %s, place %d, threads %d", what.c_str(),
                      info.name, static_cast<int>(place), threads);
        body(place);
        exchange_call_threads(outer);
      }
  }
  force_isa(before);
  setting[0] = 0;
}

void as_scalar(const std::function<void()>& body) {
  const Isa before = active_isa();
  force_isa(Isa::scalar);
  body();
  force_isa(before);
}

double worst_error(const std::vector<float>& actual, const std::vector<float>& expected,
                   double absolute, double relative) {
  CHECK(actual.size() == expected.size());
  double worst = 0;
  for (size_t i = 0; i < actual.size(); ++i) {
    const double error = std::abs(static_cast<double>(actual[i]) - expected[i]) /
                         (absolute + relative * std::abs(static_cast<double>(expected[i])));
    if (std::isnan(error)) return std::numeric_limits<double>::infinity();
    worst = std::max(worst, error);
  }
  return worst;
}

}  // namespace fastrec::tests

int main(int count, char** names) {
  using namespace fastrec::tests;
#if !defined(__SANITIZE_ADDRESS__)
  struct sigaction action = {};
  action.sa_handler = say_where;
  action.sa_flags = SA_RESETHAND;  // the access is tried again, and ends the process
  sigaction(SIGSEGV, &action, nullptr);
#else
  // AddressSanitizer reports the access and its stack; the setting is told beside it.
  (void)say_where;
#endif
  int run = 0;
  for (const Test& test : tests()) {
    if (count > 1 && !std::strstr(test.name, names[1])) continue;
    std::printf("%s\n", test.name);
    std::fflush(stdout);
    test.body();
    ++run;
  }
  std::printf("%d tests passed\n", run);
  return run ? 0 : 1;
}
