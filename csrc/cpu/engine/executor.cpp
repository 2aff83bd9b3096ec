#include "engine/executor.h"

#include <algorithm>
#include <chrono>
#include <cstddef>
#include <new>

namespace fastrec::engine {

int64_t bytes_of(Dtype dtype) {
  switch (dtype) {
    case Dtype::f32:
    case Dtype::i32:
      return 4;
    case Dtype::i64:
      return 8;
    case Dtype::u8:
    case Dtype::s8:
    case Dtype::b8:
      return 1;
  }
  return 0;
}

namespace {

constexpr int64_t kLine = 64;
// Beyond what any machine has, and far from what 64 bits hold.
constexpr double kMaxSlotBytes = 1e14;

int64_t round_up(int64_t bytes) { return (bytes + kLine - 1) / kLine * kLine; }

Tensor resolve(const Operand& operand, std::byte* data, const Symbols& symbols) {
  Tensor tensor;
  tensor.data = data ? data + operand.offset * bytes_of(operand.dtype) : nullptr;
  tensor.dtype = operand.dtype;
  tensor.dims = static_cast<int>(operand.sizes.size());
  for (int d = 0; d < tensor.dims; ++d) {
    tensor.sizes[d] = operand.sizes[d].at(symbols);
    tensor.strides[d] = operand.strides[d].at(symbols);
  }
  return tensor;
}

}  // namespace

struct Executor::Arena {
  std::unique_ptr<std::byte[]> memory;
  int64_t capacity = 0;
  std::vector<int64_t> slot_begin;

  std::byte* base() const {
    const auto address = reinterpret_cast<uintptr_t>(memory.get());
    return memory.get() + (kLine - address % kLine) % kLine;
  }

  void lay_out(const Plan& plan, const Symbols& symbols) {
    slot_begin.resize(plan.slots.size());
    int64_t end = 0;
    for (size_t s = 0; s < plan.slots.size(); ++s) {
      slot_begin[s] = end;
      int64_t bytes = 0;
      for (const Extent& buffer : plan.slots[s].bytes) {
        if (buffer.roughly(symbols) > kMaxSlotBytes) throw std::bad_alloc();
        bytes = std::max(bytes, buffer.at(symbols));
      }
      end += round_up(bytes + kSlack);
    }
    if (end > capacity) {
      memory = std::make_unique_for_overwrite<std::byte[]>(end + kLine);
      capacity = end;
    }
  }
};

// An arena for the time of a call, given back however the call ends: an allocation may throw.
struct Executor::Lent {
  explicit Lent(Executor& executor) : executor(executor), arena(executor.take()) {}
  Lent(const Lent&) = delete;
  ~Lent() { executor.give(arena); }
  Arena* operator->() const { return arena; }

  Executor& executor;
  Arena* const arena;
};

Executor::Executor(Plan plan) : plan_(std::move(plan)) {
  for (Step& step : plan_.steps) {
    const Prepare prepare = find_kind(step.kind)->prepare;
    if (!prepare || step.prepared) continue;
    Tensor tensors[kMaxOperands];
    for (size_t o = 0; o < step.operands.size(); ++o) {
      const Operand& operand = step.operands[o];
      const bool constant = operand.space == Space::constant;
      std::byte* data = constant ? const_cast<std::byte*>(plan_.constants[operand.index]) : nullptr;
      tensors[o] = resolve(operand, data, Symbols{});
    }
    step.prepared = prepare(step, tensors);
  }
}

Executor::~Executor() {
  for (auto& kept : kept_) delete kept.load();
}

Executor::Arena* Executor::take() {
  for (auto& kept : kept_)
    if (kept.load(std::memory_order_relaxed))
      if (Arena* arena = kept.exchange(nullptr, std::memory_order_acquire)) return arena;
  return new Arena;
}

void Executor::give(Arena* arena) {
  for (auto& kept : kept_) {
    Arena* empty = nullptr;
    if (kept.compare_exchange_strong(empty, arena, std::memory_order_release)) return;
  }
  delete arena;
}

Status Executor::run(const Symbols& symbols, const std::byte* const* inputs,
                     std::byte* const* outputs, int64_t* step_ns) {
  const Lent arena(*this);
  arena->lay_out(plan_, symbols);
  std::byte* const base = arena->base();
  Tensor tensors[kMaxOperands];
  Status status;
  for (size_t s = 0; s < plan_.steps.size() && status.fault == Fault::none; ++s) {
    const Step& step = plan_.steps[s];
    for (size_t o = 0; o < step.operands.size(); ++o) {
      const Operand& operand = step.operands[o];
      std::byte* data = nullptr;
      switch (operand.space) {
        case Space::input:
          data = const_cast<std::byte*>(inputs[operand.index]);
          break;
        case Space::constant:
          data = const_cast<std::byte*>(plan_.constants[operand.index]);
          break;
        case Space::arena:
          data = base + arena->slot_begin[operand.index];
          break;
        case Space::output:
          data = outputs[operand.index];
          break;
      }
      tensors[o] = resolve(operand, data, symbols);
    }
    const auto start =
        step_ns ? std::chrono::steady_clock::now() : decltype(std::chrono::steady_clock::now()){};
    status = step.run(step, tensors);
    if (step_ns)
      step_ns[s] = std::chrono::nanoseconds(std::chrono::steady_clock::now() - start).count();
    if (status.fault != Fault::none) status.step = static_cast<int>(s);
  }
  return status;
}

}  // namespace fastrec::engine
