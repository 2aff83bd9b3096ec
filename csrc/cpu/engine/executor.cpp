#include "engine/executor.h"

#include <algorithm>
#include <atomic>
#include <chrono>
#include <cstddef>
#include <exception>
#include <limits>
#include <map>
#include <mutex>
#include <new>
#include <string>

#include "parallel.h"

namespace fastrec::engine {

namespace {

using Clock = std::chrono::steady_clock;

constexpr int64_t kLine = 64;
// Rows that a layer needs for its weights to be worth reading: the arithmetic then takes longer.
constexpr int64_t kRowsAPart = 32;
// Fewer rows than that are not worth a thread's start; more at a time than that would leave its
// caches before the next step reads them.
constexpr int64_t kRowsWorthAThread = 16, kRowsInCache = 64;
// Beyond what any machine has, and far from what 64 bits hold.
constexpr double kMaxSlotBytes = 1e14;
// Weights that steps share are packed once for equal steps, and no more than so often for others: a
// file must not take many times its size.
constexpr int64_t kMaxPackings = 16, kMinPacked = 1 << 20;

int64_t since_ns(Clock::time_point start) {
  return std::chrono::nanoseconds(Clock::now() - start).count();
}

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

// Leaves of the dimension that counts the rows only a part.
void narrow(Tensor& tensor, const Operand& operand, int symbol, int64_t begin, int64_t count) {
  for (int d = 0; d < tensor.dims; ++d) {
    if (operand.sizes[d].exponent[symbol] == 0) continue;
    const int64_t row =
        operand.tile_row ? operand.tile_row : tensor.strides[d] * bytes_of(tensor.dtype);
    tensor.data += begin * row;
    tensor.sizes[d] = count;
    return;
  }
}

// The outcome of parts that run beside each other: the first part's failure.
class Failure {
 public:
  template <class F>
  void watch(int64_t part, F&& run) {
    Status found;
    std::exception_ptr error;
    try {
      found = run();
    } catch (...) {
      error = std::current_exception();
    }
    if (!error && found.fault == Fault::none) return;
    const std::lock_guard lock(mutex_);  // taken only by what ends the call
    if (error) thrown_ = error;
    if (part < part_) part_ = part, status_ = found;
  }

  Status status() const {
    if (thrown_) std::rethrow_exception(thrown_);
    return status_;
  }

 private:
  std::mutex mutex_;
  int64_t part_ = std::numeric_limits<int64_t>::max();
  Status status_;
  std::exception_ptr thrown_;
};

}  // namespace

std::vector<int64_t> sizes_at(const Shape& shape, const Symbols& symbols) {
  std::vector<int64_t> sizes;
  double elements = 1;
  for (const Extent& size : shape) {
    elements *= std::max(size.roughly(symbols), 1.0);
    sizes.push_back(size.at(symbols));
  }
  if (elements > kMaxSlotBytes) throw std::bad_alloc();
  return sizes;
}

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

struct Executor::Request {
  const Symbols& symbols;
  const std::byte* const* inputs;
  std::byte* const* outputs;
  int64_t* step_ns;
};

// Where the users of a part, and what is computed of them, lie.
struct Executor::Place {
  const Request& request;
  const Symbols& symbols;
  int64_t user0, users;
  std::byte* base;
  const int64_t* slot_begin;
  int64_t beside;  // parts at work at once: a step's time is shared among them
};

struct Executor::Rows {
  int symbol;
  int64_t begin, count;
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

Executor::Executor(Plan plan)
    : plan_(std::move(plan)),
      row_ps_(std::make_unique<std::atomic<int64_t>[]>(plan_.groups.size())) {
  std::map<std::string, std::shared_ptr<const void>> made;
  std::map<int, int64_t> held;  // bytes of each constant
  int64_t packed = 0;
  for (Step& step : plan_.steps) {
    if (!step.kind->prepare || step.prepared) continue;
    Tensor tensors[kMaxOperands];
    std::string key = step.kind->name + json::write(step.kind->write(step.fields.get()));
    int64_t bytes = 0;
    for (size_t o = 0; o < step.operands.size(); ++o) {
      const Operand& operand = step.operands[o];
      const bool constant = operand.space == Space::constant && operand.index >= 0;
      std::byte* data = constant ? const_cast<std::byte*>(plan_.constants[operand.index]) : nullptr;
      const Tensor& tensor = tensors[o] = resolve(operand, data, Symbols{});
      key += constant ? '+' + std::to_string(operand.index) : "-";
      for (int d = 0; d < tensor.dims; ++d)
        key += ',' + std::to_string(tensor.sizes[d]) + '*' + std::to_string(tensor.strides[d]);
      if (!constant) continue;
      key += '@' + std::to_string(operand.offset);
      if (operand.strides != contiguous_strides(operand.sizes)) continue;
      int64_t& whole = held[operand.index];
      const int64_t size = tensor.count() * bytes_of(tensor.dtype);
      whole = std::max(whole, size);
      bytes += size;
    }
    std::shared_ptr<const void>& one = made[key];
    if (!one) {
      packed += bytes;
      int64_t most = kMinPacked;
      for (const auto& [index, size] : held) most += kMaxPackings * size;
      if (packed > most) throw InvalidProgram("an invalid plan: weights that few steps share");
      one = step.kind->prepare(step.fields.get(), {tensors, step.operands.size()});
    }
    step.prepared = one;
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

int64_t Executor::users_a_part(const Symbols& symbols) const {
  Symbols one = symbols;
  one[plan_.users] = 1;
  int64_t users = 1;
  for (const Extent& rows : plan_.rows) {
    const int64_t count = std::max<int64_t>(rows.at(one), 1);
    users = std::max(users, (kRowsAPart + count - 1) / count);
  }
  return users;
}

Status Executor::run_step(const Place& place, size_t position, const Rows* rows) {
  const Request& request = place.request;
  const Step& step = plan_.steps[position];
  Tensor tensors[kMaxOperands];
  for (size_t o = 0; o < step.operands.size(); ++o) {
    const Operand& operand = step.operands[o];
    std::byte* data = nullptr;
    if (operand.index >= 0) switch (operand.space) {
        case Space::input:
          data = const_cast<std::byte*>(request.inputs[operand.index]);
          break;
        case Space::constant:
          data = const_cast<std::byte*>(plan_.constants[operand.index]);
          break;
        case Space::arena:
          data = place.base + place.slot_begin[operand.index];
          break;
        case Space::output:
          data = request.outputs[operand.index];
          break;
      }
    Tensor& tensor = tensors[o] = resolve(operand, data, place.symbols);
    const bool of_call = operand.space == Space::input || operand.space == Space::output;
    if (of_call && place.user0 > 0 && tensor.dims > 0 && operand.sizes[0].exponent[plan_.users])
      tensor.data +=
          tensor.sizes[0] / place.users * tensor.strides[0] * place.user0 * bytes_of(tensor.dtype);
    if (rows) narrow(tensor, operand, rows->symbol, rows->begin, rows->count);
  }
  const auto start = request.step_ns ? Clock::now() : Clock::time_point{};
  Status status =
      step.kind->run(step.fields.get(), {tensors, step.operands.size()}, step.prepared.get());
  if (request.step_ns)
    std::atomic_ref(request.step_ns[position])
        .fetch_add(std::chrono::nanoseconds(Clock::now() - start).count() / place.beside,
                   std::memory_order_relaxed);
  if (status.fault != Fault::none) status.step = static_cast<int>(position);
  return status;
}

Status Executor::run_rows(const Place& place, size_t index, int threads) {
  const RowGroup& group = plan_.groups[index];
  std::atomic<int64_t>& row_ps = row_ps_[index];
  const int64_t rows = place.symbols[group.symbol];
  const int64_t rounds = (rows + threads * kRowsInCache - 1) / (threads * kRowsInCache);
  const int64_t parts = std::min(rows / kRowsWorthAThread, rounds * threads);
  Place here = place;
  here.beside = std::min<int64_t>(threads, parts);
  Failure failure;
  auto run = [&](int64_t begin, int64_t end) {
    for (int64_t p = begin; p < end; ++p) {
      const int64_t row0 = p * rows / parts;
      const Rows part{group.symbol, row0, (p + 1) * rows / parts - row0};
      const auto start = Clock::now();
      failure.watch(p, [&] {
        Status status;
        for (int s = group.begin; s < group.end && status.fault == Fault::none; ++s)
          status = run_step(here, s, &part);
        return status;
      });
      row_ps.store(since_ns(start) * 1000 / part.count, std::memory_order_relaxed);
    }
  };
  parallel_for(parts, 1, threads, run,
               row_ps.load(std::memory_order_relaxed) * rows / parts / 1000);
  return failure.status();
}

Status Executor::run_part(const Request& request, int64_t user0, int64_t users, int64_t beside) {
  Symbols symbols = request.symbols;
  if (plan_.users >= 0) symbols[plan_.users] = users;
  const Lent arena(*this);
  arena->lay_out(plan_, symbols);
  const Place place{request, symbols, user0, users, arena->base(), arena->slot_begin.data(),
                    beside};
  const int threads = users == 1 ? num_threads() : 1;
  size_t group = 0;
  Status status;
  for (size_t s = 0; s < plan_.steps.size() && status.fault == Fault::none;) {
    if (group < plan_.groups.size() && s == static_cast<size_t>(plan_.groups[group].begin)) {
      const RowGroup& here = plan_.groups[group++];
      if (threads > 1 && symbols[here.symbol] >= 2 * kRowsWorthAThread) {
        status = run_rows(place, group - 1, threads);
        s = here.end;
        continue;
      }
    }
    status = run_step(place, s++, nullptr);
  }
  return status;
}

Status Executor::run(const Symbols& symbols, const std::byte* const* inputs,
                     std::byte* const* outputs, int64_t* step_ns) {
  const Request request{symbols, inputs, outputs, step_ns};
  if (step_ns) std::fill_n(step_ns, plan_.steps.size(), 0);
  if (plan_.users < 0) return run_part(request, 0, 1, 1);
  const int64_t users = symbols[plan_.users];
  const int threads = num_threads();
  const int64_t parts = std::max<int64_t>(users / users_a_part(symbols), 1);
  // The parts left when each thread has had as many parts as the others: threads that would wait
  // are better used by running it together, unless most have a part.
  const int64_t left = parts % threads;
  const int64_t apart = parts - (2 * left <= threads ? left : 0);
  if (apart < 2) return run_part(request, 0, users, 1);

  Failure failure;
  const auto user0 = [&](int64_t of) { return of * users / parts; };
  const auto run_parts = [&](int64_t begin, int64_t end, int64_t beside) {
    failure.watch(
        begin, [&] { return run_part(request, user0(begin), user0(end) - user0(begin), beside); });
  };
  auto run_apart = [&](int64_t begin, int64_t end) {
    for (int64_t p = begin; p < end; ++p) {
      const auto start = Clock::now();
      run_parts(p, p + 1, std::min<int64_t>(threads, apart));
      user_ns_.store(since_ns(start) / (user0(p + 1) - user0(p)), std::memory_order_relaxed);
    }
  };
  const int64_t part_ns = user_ns_.load(std::memory_order_relaxed) * (users / parts);
  parallel_for(apart, 1, threads, run_apart, part_ns);
  if (apart < parts) run_parts(apart, parts, 1);
  return failure.status();
}

}  // namespace fastrec::engine
