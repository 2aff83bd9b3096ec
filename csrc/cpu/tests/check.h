// A test frame in one header: TEST bodies that register themselves, CHECK, and buffers whose every
// byte outside is out of bounds.
#pragma once

#include <cstdint>
#include <cstdio>
#include <cstdlib>
#include <cstring>
#include <functional>
#include <random>
#include <string>
#include <type_traits>
#include <vector>

namespace fastrec::tests {

struct Test {
  const char* name;
  void (*body)();
};
std::vector<Test>& tests();  // main.cpp

struct Registered {
  Registered(const char* name, void (*body)()) { tests().push_back({name, body}); }
};

#define FASTREC_TEST_OF(name)                             \
  static void name();                                     \
  static const Registered registered_##name{#name, name}; \
  static void name()
#define TEST(name) FASTREC_TEST_OF(name)

// The setting that runs, for failure messages and crashes at guard pages.
extern char setting[256];

#define CHECK(condition)                                                       \
  do {                                                                         \
    if (!(condition)) {                                                        \
      std::fprintf(stderr, "%s:%d: %s [%s]\n", __FILE__, __LINE__, #condition, \
                   ::fastrec::tests::setting);                                 \
      std::exit(1);                                                            \
    }                                                                          \
  } while (0)

// heap: an exact block, whose surroundings AddressSanitizer watches where it sees the access.
// before_guard, after_guard: the data ends at, begins behind, a page that can't be touched, which
// also stops what the compiler does not instrument.
enum class Place { heap, before_guard, after_guard };

void* place_bytes(size_t bytes, Place place);  // filled with 0xff: NaN in every float
void release_bytes(void* data, size_t bytes, Place place);

template <class T>
class Buffer {
 public:
  Buffer(size_t count, Place place)
      : count_(count),
        place_(place),
        data_(static_cast<T*>(place_bytes(count * sizeof(T), place))) {}
  Buffer(const std::vector<T>& values, Place place) : Buffer(values.size(), place) {
    if (count_) std::memcpy(data_, values.data(), count_ * sizeof(T));
  }
  Buffer(const Buffer&) = delete;
  Buffer& operator=(const Buffer&) = delete;
  ~Buffer() {
    release_bytes(const_cast<std::remove_const_t<T>*>(data_), count_ * sizeof(T), place_);
  }

  T* data() { return data_; }
  const T* data() const { return data_; }
  size_t size() const { return count_; }
  std::vector<T> values() const { return std::vector<T>(data_, data_ + count_); }

 private:
  size_t count_;
  Place place_;
  T* data_;
};

// Deterministic inputs.
class Random {
 public:
  explicit Random(uint64_t seed) : engine_(seed) {}

  template <class T>
  std::vector<T> integers(size_t count, int64_t low, int64_t high) {  // both included
    std::vector<T> out(count);
    for (T& value : out)
      value = static_cast<T>(
          low + static_cast<int64_t>(engine_() % static_cast<uint64_t>(high - low + 1)));
    return out;
  }
  std::vector<float> floats(size_t count, float scale = 1.0f) {  // uniform in [-scale, scale)
    std::vector<float> out(count);
    for (float& value : out)
      value = scale * (static_cast<float>(engine_() % (1u << 24)) / (1u << 23) - 1.0f);
    return out;
  }

 private:
  std::mt19937_64 engine_;
};

// Runs body under every instruction set that this machine has, in every place, on one thread and on
// as many as there are; `what` names the case.
void for_every_setting(const std::string& what, const std::function<void(Place)>& body);

// Runs body under the scalar twin.
void as_scalar(const std::function<void()>& body);

// Largest |actual - expected| / (absolute + relative * |expected|); infinite for a NaN.
double worst_error(const std::vector<float>& actual, const std::vector<float>& expected,
                   double absolute, double relative);

}  // namespace fastrec::tests
