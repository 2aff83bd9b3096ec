// Engine files as an attacker may write them: bytes, lengths, and the header's values with right
// checksums. Loading and running them must be refused or harmless.
//
// By hand: FASTREC_MUTATIONS=COUNT:SEED:FILE,FILE run_tests mutated
#include <signal.h>

#include <atomic>
#include <fstream>
#include <sstream>

#include "engine/user_state.h"
#include "engine_file_samples.h"

#if defined(__SANITIZE_ADDRESS__)
// Of sanitizer/allocator_interface.h, which not every compiler's package has.
extern "C" int __sanitizer_install_malloc_and_free_hooks(void (*malloc_hook)(const volatile void*,
                                                                             size_t),
                                                         void (*free_hook)(const volatile void*));
extern "C" size_t __sanitizer_get_allocated_size(const volatile void* memory);
#endif

namespace fastrec::tests {
namespace {

// Bytes that the heap holds now, and held at most: under AddressSanitizer, else 0.
std::atomic<int64_t> heap{0}, peak{0};

#if defined(__SANITIZE_ADDRESS__)
void watch_heap() {
  static const int installed = __sanitizer_install_malloc_and_free_hooks(
      [](const volatile void*, size_t bytes) {
        const int64_t now = heap += static_cast<int64_t>(bytes);
        if (now > peak) peak = now;
      },
      [](const volatile void* memory) {
        heap -= static_cast<int64_t>(__sanitizer_get_allocated_size(memory));
      });
  CHECK(installed > 0);
}
#else
void watch_heap() {}
#endif

// More than a file's parse (a value of two bytes becomes 40, while its list grows 120), its plan
// and its packed weights need.
int64_t most_heap(size_t file_bytes) { return 1'000'000 + 64 * static_cast<int64_t>(file_bytes); }
constexpr double kMostWork = 1 << 20;  // elements that a request's buffers and operands may have
constexpr unsigned kMostSeconds = 20;  // of one file

class Mutator {
 public:
  explicit Mutator(uint64_t seed) : engine_(seed) {}

  size_t pick(size_t count) { return count ? engine_() % count : 0; }

  std::string bytes(std::string file) {
    switch (pick(6)) {
      case 0:
        return file.substr(0, pick(file.size()));
      case 1:
        return file + std::string(1 + pick(200), static_cast<char>(pick(256)));
      case 2:
        return file.erase(pick(file.size()), 1 + pick(64));
      default:
        for (size_t i = 0, count = 1 + pick(4); i < count; ++i)
          file[pick(file.size())] = static_cast<char>(pick(256));
        return file;
    }
  }

  // Another value in place of one of the header's, or two.
  json::Value header(const json::Value& from) {
    json::Value made = from;
    for (size_t changes = 0; changes <= pick(2); ++changes) {
      all_.clear();
      collect(made);
      target_ = pick(all_.size());
      made = copy(made);
    }
    return made;
  }

 private:
  void collect(const json::Value& value) {
    all_.push_back(&value);
    value.visit([this](const auto& held) {
      using Held = std::decay_t<decltype(held)>;
      if constexpr (std::is_same_v<Held, json::List>)
        for (const json::Value& item : held) collect(item);
      else if constexpr (std::is_same_v<Held, json::Object>)
        for (const auto& [name, item] : held) collect(item);
    });
  }

  json::Value copy(const json::Value& value) {
    if (target_-- == 0) return other(value);
    json::Value made = value;
    value.visit([&](const auto& held) {
      using Held = std::decay_t<decltype(held)>;
      if constexpr (std::is_same_v<Held, json::List>) {
        json::List list;
        for (const json::Value& item : held) list.push_back(copy(item));
        made = std::move(list);
      } else if constexpr (std::is_same_v<Held, json::Object>) {
        json::Object members;
        for (const auto& [name, item] : held) members.emplace_back(name, copy(item));
        made = std::move(members);
      }
    });
    return made;
  }

  json::Value other(const json::Value& value) {
    static constexpr int64_t kNumbers[] = {
        0,         1,         2,         3,         4,
        5,         7,         8,         16,        31,
        32,        64,        128,       1000,      1 << 16,
        1 << 20,   1 << 30,   INT32_MAX, -1,        INT64_MAX,
        INT64_MIN, 1LL << 31, 1LL << 32, 1LL << 40, (1LL << 40) + 1,
        1LL << 50};
    static constexpr double kReals[] = {0.0, 1.0, -1.0, 0.5, 1e-320, 1e-45, 1e30, 1e39, -1e300};
    static constexpr const char* kTexts[] = {
        "",     "B",     "L",     "m",   "float32", "int64",    "int8",   "uint8",  "int32",
        "bool", "input", "arena", "map", "linear",  "constant", "output", "native", "scalar"};
    if (pick(4) == 0) return *all_[pick(all_.size())];
    json::Value made = json::List{};
    value.visit([&](const auto& held) {
      using Held = std::decay_t<decltype(held)>;
      if constexpr (std::is_same_v<Held, int64_t>) {
        made = pick(2) ? kNumbers[pick(std::size(kNumbers))]
                       : static_cast<int64_t>(static_cast<uint64_t>(held) + pick(3) - 1);
      } else if constexpr (std::is_same_v<Held, double>) {
        made = kReals[pick(std::size(kReals))];
      } else if constexpr (std::is_same_v<Held, std::string>) {
        made = kTexts[pick(std::size(kTexts))];
      } else if constexpr (std::is_same_v<Held, bool>) {
        made = !held;
      } else if constexpr (std::is_same_v<Held, json::List>) {
        json::List list = held;
        const size_t how = pick(4), at = pick(list.size());
        if (list.empty() || how == 0)
          list.push_back(*all_[pick(all_.size())]);
        else if (how == 1)
          list.erase(list.begin() + static_cast<int64_t>(at));
        else if (how == 2)
          std::swap(list[at], list[pick(list.size())]);
        else
          list.insert(list.begin() + static_cast<int64_t>(at), list[at]);
        made = std::move(list);
      } else if constexpr (std::is_same_v<Held, json::Object>) {
        json::Object members = held;
        if (!members.empty() && pick(2))
          members.erase(members.begin() + static_cast<int64_t>(pick(members.size())));
        else if (!members.empty())
          members[pick(members.size())].second = *all_[pick(all_.size())];
        made = std::move(members);
      }
    });
    return made;
  }

  std::mt19937_64 engine_;
  std::vector<const json::Value*> all_;
  size_t target_ = 0;
};

// A request that the engine's specification admits, where that is small.
struct Sampled {
  std::vector<std::vector<int64_t>> sizes;
  std::vector<std::vector<std::byte>> memory;
  std::vector<Array> arrays;
  SpecSizes found = unknown_sizes();
};

bool sample(const InputSpec& spec, Sampled& made) {
  SpecSizes sizes{};
  for (size_t s = 0; s < spec.symbols.size(); ++s) {
    sizes[s] = 2 + static_cast<int64_t>(s);
    if (spec.limits[s].high >= 0) sizes[s] = std::min(sizes[s], spec.limits[s].high);
    sizes[s] = std::max(sizes[s], spec.limits[s].low);
  }
  for (const InputField& field : spec.fields) {
    std::vector<int64_t>& shape = made.sizes.emplace_back();
    double count = 8;
    for (const SpecSize& dim : field.dims) {
      shape.push_back(dim.symbol < 0 ? dim.number : sizes[dim.symbol]);
      count *= static_cast<double>(shape.back());
    }
    if (count > kMostWork) return false;
    std::vector<std::byte>& bytes = made.memory.emplace_back(static_cast<size_t>(count));
    // Ids of 0 and 1; everything else is 0.
    if (field.rows && field.dtype == Dtype::i64 &&
        (field.rows->symbol >= 0 || field.rows->number > 1))
      for (size_t at = 0; at + 8 <= bytes.size(); at += 16) bytes[at] = std::byte{1};
    made.arrays.push_back(
        {bytes.data(), field.dtype, static_cast<int>(shape.size()), shape.data()});
  }
  return spec.admits(made.arrays.data(), made.found);
}

bool is_small(const Program& program, const Symbols& symbols) {
  double total = 0;
  const auto count = [&](const Shape& shape) {
    double elements = 1;
    for (const Extent& size : shape) elements *= std::max(size.roughly(symbols), 1.0);
    return elements;
  };
  for (const engine::Buffer& buffer : program.buffers) total += count(buffer.shape);
  for (const ProgramStep& step : program.steps)
    for (const View& view : step.operands)
      if (!view.absent()) total = std::max(total, count(view.sizes));
  return total <= kMostWork;
}

std::vector<float> scored(Engine& engine, bool parts) {
  Sampled request;
  if (!sample(engine.inputs(), request)) return {};
  if (!is_small(engine.program(), symbols_of(request.found))) return {};
  size_t count = 1;
  for (const int64_t size : engine.output_sizes(request.found)) count *= static_cast<size_t>(size);
  std::vector<float> scores(count);
  engine.run(request.arrays.data(), request.found, scores.data(), 1);
  if (!parts) return scores;
  std::vector<int> candidates;
  const int symbol = engine.inputs().symbol("m");
  for (size_t i = 0; i < engine.inputs().fields.size(); ++i)
    for (const SpecSize& dim : engine.inputs().fields[i].dims)
      if (symbol >= 0 && dim.symbol == symbol &&
          (candidates.empty() || candidates.back() != static_cast<int>(i)))
        candidates.push_back(static_cast<int>(i));
  const auto split = engine.split(candidates, candidates.empty());
  const auto given = [&](const std::vector<int>& positions) {
    std::vector<Array> arrays;
    for (const int i : positions) arrays.push_back(request.arrays[i]);
    return arrays;
  };
  const std::vector<Array> history = given(split->history()), few = given(split->candidates());
  SpecSizes sizes = unknown_sizes();
  if (!split->history_inputs().admits(history.data(), sizes)) return scores;
  const auto state = split->encode(history.data(), sizes, 1);
  if (split->scores()) {
    if (!split->candidate_inputs().admits(few.data(), sizes)) return scores;
    std::vector<float> again(count);
    split->score(*state, few.data(), sizes, again.data(), 1);
  } else if (split->appends()) {
    const std::vector<Array> events = given(split->events());
    SpecSizes own = unknown_sizes();
    if (split->event_inputs().admits(events.data(), own)) split->append(*state, events.data(), 1);
  }
  return scores;
}

struct Tally {
  int64_t refused = 0, opened = 0, ran = 0, heap = 0;
  double of_file = 0;  // the largest share of a file's bound
};

// Opens the file and runs it; the scores where it ran.
std::vector<float> attempt(const std::string& content, TemporaryFile& file, Keep keep,
                           Tally& tally) {
  file.write(content);
  alarm(kMostSeconds);
  std::vector<float> scores;
  const int64_t before = heap;
  peak = before;
  const auto weigh = [&] {
    const int64_t held = peak - before;
    tally.heap = std::max(tally.heap, held);
    tally.of_file = std::max(
        tally.of_file, static_cast<double>(held) / static_cast<double>(most_heap(content.size())));
    CHECK(held <= most_heap(content.size()));
  };
  try {
    const OpenedFile opened = open_file(file.path(), keep);
    weigh();
    ++tally.opened;
    scores = scored(*opened.engine, true);
    tally.ran += !scores.empty();
  } catch (const FileError&) {
    weigh();
    ++tally.refused;
  } catch (const Refused&) {
  } catch (const CannotSplit&) {
  } catch (const std::bad_alloc&) {
  }
  alarm(0);
  return scores;
}

void too_long(int) {
  const char text[] = "a file took too long\n";
  [[maybe_unused]] ssize_t written = ::write(2, text, sizeof(text) - 1);
  written = ::write(2, setting, std::strlen(setting));
  _exit(1);
}

void mutate(const std::string& name, const std::string& content, uint64_t seed, int64_t count) {
  watch_heap();
  signal(SIGALRM, too_long);
  int64_t header_bytes;
  std::memcpy(&header_bytes, content.data() + 16, 8);
  const json::Value header = json::parse(std::string_view(content).substr(64, header_bytes));
  const std::string sections = content.substr(64 + header_bytes);
  TemporaryFile file;
  Tally bytes, values;
  for (int64_t i = 0; i < count; ++i) {
    std::snprintf(setting, sizeof(setting), "%.99s, seed %llu", name.c_str(),
                  static_cast<unsigned long long>(seed));
    Mutator mutator(seed++);
    const Keep keep = i % 8 ? Keep::copied : Keep::mapped;
    if (i % 4 == 0) {
      // No byte is without a checksum.
      const std::string changed = mutator.bytes(content);
      attempt(changed, file, keep, bytes);
      CHECK(changed == content || bytes.opened == 0);
      if (changed == content) bytes.opened = 0;
    } else {
      attempt(put_together(json::write(mutator.header(header)), sections), file, keep, values);
    }
  }
  std::printf(
      "%s: bytes %lld refused; values %lld refused, %lld opened, %lld ran; heap at most "
      "%lld bytes, %.2f of a file's bound\n",
      name.c_str(), static_cast<long long>(bytes.refused), static_cast<long long>(values.refused),
      static_cast<long long>(values.opened), static_cast<long long>(values.ran),
      static_cast<long long>(std::max(bytes.heap, values.heap)),
      std::max(bytes.of_file, values.of_file));
  setting[0] = 0;
  // All of it happens, or this shows nothing.
  if (count >= 1000) CHECK(values.refused > 0 && values.ran > 0 && bytes.refused > 0);
}

}  // namespace

TEST(headers_take_a_small_multiple_of_their_text) {
  watch_heap();
  TemporaryFile file;
  Tally tally;
  for (const char* const item : {"0,", "[],", "{},", "\"\",", "[[[[0]]]],"}) {
    std::string header = "[";
    while (header.size() < 1'000'000) header += item;
    header.back() = ']';
    attempt(put_together(header, ""), file, Keep::copied, tally);
  }
  CHECK(tally.refused == 5);
}

TEST(mutated_files_are_refused_or_harmless) {
  const char* const by_hand = std::getenv("FASTREC_MUTATIONS");
  if (!by_hand) {
    mutate("ranker", engine_file(small_ranker()), 1, 1500);
    mutate("sequence", engine_file(small_sequence()), 1'000'000, 1500);
    return;
  }
  std::istringstream told(by_hand);
  std::string count, seed, path;
  std::getline(told, count, ':');
  std::getline(told, seed, ':');
  while (std::getline(told, path, ',')) {
    std::string content;
    if (path == "ranker" || path == "sequence") {
      content = engine_file(path == "ranker" ? small_ranker() : small_sequence());
    } else {
      std::ostringstream all;
      all << std::ifstream(path, std::ios::binary).rdbuf();
      content = all.str();
    }
    mutate(path, content, std::stoull(seed), std::stoll(count));
  }
}

}  // namespace fastrec::tests
