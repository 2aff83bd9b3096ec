// Working memory of one thread: grown when needed, kept for the next call.
#pragma once

#include <cstddef>
#include <cstdint>
#include <cstring>
#include <memory>

#if defined(__SANITIZE_ADDRESS__)
#include <sanitizer/asan_interface.h>
#endif

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
  T* const memory = reinterpret_cast<T*>(address + (kLine - address % kLine) % kLine);
#if defined(__SANITIZE_ADDRESS__)
  // Bytes beyond the elements asked for are out of bounds, also those of an earlier, larger call.
  ASAN_UNPOISON_MEMORY_REGION(buffer.get(), capacity);
  std::memset(buffer.get(), 0xff, capacity);
  const std::byte* end = reinterpret_cast<std::byte*>(memory + count);
  ASAN_POISON_MEMORY_REGION(end, static_cast<size_t>(buffer.get() + capacity - end));
#endif
  return memory;
}

}  // namespace fastrec
