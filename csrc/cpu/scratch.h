// Working memory of one thread: grown when needed, kept for the next call.
#pragma once

#include <cstddef>
#include <cstdint>
#include <memory>

namespace fastrec {

// At least `count` elements, aligned to a cache line, valid until this thread asks again.
template <class T>
T* scratch(int64_t count) {
  constexpr size_t kLine = 64;
  thread_local std::unique_ptr<std::byte[]> buffer;
  thread_local size_t capacity = 0;
  const size_t bytes = static_cast<size_t>(count) * sizeof(T) + kLine;
  if (bytes > capacity) {
    buffer = std::make_unique_for_overwrite<std::byte[]>(bytes);
    capacity = bytes;
  }
  const auto address = reinterpret_cast<uintptr_t>(buffer.get());
  return reinterpret_cast<T*>(address + (kLine - address % kLine) % kLine);
}

}  // namespace fastrec
