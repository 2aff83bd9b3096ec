#include "cpu_features.h"

#include <atomic>

#if defined(__x86_64__)
#include <cpuid.h>
#endif

namespace fastrec {
namespace {

constexpr uint64_t kXcr0Avx = 0x6;      // XMM and upper YMM state
constexpr uint64_t kXcr0Avx512 = 0xe6;  // and opmask, upper ZMM, ZMM16-31

enum class Word { leaf1_ecx, leaf7_ebx, leaf7_ecx, leaf7_1_eax };

struct Feature {
  std::string_view name;
  Word word;
  int bit;
  uint64_t xcr0;
};

// Intel SDM vol. 2A, table of CPUID leaves 1 and 7.
constexpr Feature kFeatures[] = {
    {"fma", Word::leaf1_ecx, 12, kXcr0Avx},
    {"avx", Word::leaf1_ecx, 28, kXcr0Avx},
    {"f16c", Word::leaf1_ecx, 29, kXcr0Avx},
    {"avx2", Word::leaf7_ebx, 5, kXcr0Avx},
    {"avx512f", Word::leaf7_ebx, 16, kXcr0Avx512},
    {"avx512dq", Word::leaf7_ebx, 17, kXcr0Avx512},
    {"avx512bw", Word::leaf7_ebx, 30, kXcr0Avx512},
    {"avx512vl", Word::leaf7_ebx, 31, kXcr0Avx512},
    {"avx512vnni", Word::leaf7_ecx, 11, kXcr0Avx512},
    {"avxvnni", Word::leaf7_1_eax, 4, kXcr0Avx},
    {"avx512bf16", Word::leaf7_1_eax, 5, kXcr0Avx512},
};
constexpr int kOsxsaveBit = 27;  // of CPUID(1).ecx

uint32_t read(const CpuWords& words, Word word) {
  switch (word) {
    case Word::leaf1_ecx:
      return words.leaf1_ecx;
    case Word::leaf7_ebx:
      return words.leaf7_ebx;
    case Word::leaf7_ecx:
      return words.leaf7_ecx;
    case Word::leaf7_1_eax:
      return words.leaf7_1_eax;
  }
  return 0;
}

bool has(const CpuWords& words, std::string_view name) {
  for (const Feature& feature : kFeatures) {
    if (feature.name != name) continue;
    const bool osxsave = (words.leaf1_ecx >> kOsxsaveBit) & 1;
    if (!osxsave || (words.xcr0 & feature.xcr0) != feature.xcr0) return false;
    if (feature.word != Word::leaf1_ecx && words.max_leaf < 7) return false;
    return (read(words, feature.word) >> feature.bit) & 1;
  }
  return false;
}

constexpr int kNotForced = -1;
std::atomic<int> forced_isa{kNotForced};

Isa detect() {
  const CpuWords words = read_cpu_words();
  Isa best = Isa::scalar;
  for (const IsaInfo& info : kIsaTable)
    if (supports(words, info.target)) best = info.isa;
  return best;
}

}  // namespace

CpuWords read_cpu_words() {
  CpuWords words;
#if defined(__x86_64__)
  uint32_t eax, ebx, ecx, edx;
  words.max_leaf = __get_cpuid_max(0, nullptr);
  if (__get_cpuid(1, &eax, &ebx, &ecx, &edx)) words.leaf1_ecx = ecx;
  if (__get_cpuid_count(7, 0, &eax, &ebx, &ecx, &edx)) {
    words.leaf7_ebx = ebx;
    words.leaf7_ecx = ecx;
    // eax is the highest subleaf.
    if (eax >= 1 && __get_cpuid_count(7, 1, &eax, &ebx, &ecx, &edx)) words.leaf7_1_eax = eax;
  }
  if ((words.leaf1_ecx >> kOsxsaveBit) & 1) {
    uint32_t low, high;
    // The mnemonic needs -mxsave, which the baseline does not have.
    __asm__ volatile("xgetbv" : "=a"(low), "=d"(high) : "c"(0));
    words.xcr0 = (static_cast<uint64_t>(high) << 32) | low;
  }
#endif
  return words;
}

bool supports(const CpuWords& words, std::string_view target) {
  while (!target.empty()) {
    const size_t comma = target.find(',');
    if (!has(words, target.substr(0, comma))) return false;
    if (comma == std::string_view::npos) break;
    target.remove_prefix(comma + 1);
  }
  return true;
}

bool machine_has(Isa isa) {
  static const CpuWords words = read_cpu_words();
  return supports(words, kIsaTable[static_cast<int>(isa)].target);
}

Isa active_isa() {
  static const Isa best = detect();
  const int forced = forced_isa.load(std::memory_order_relaxed);
  return forced == kNotForced ? best : static_cast<Isa>(forced);
}

void force_isa(Isa isa) { forced_isa.store(static_cast<int>(isa), std::memory_order_relaxed); }

}  // namespace fastrec
