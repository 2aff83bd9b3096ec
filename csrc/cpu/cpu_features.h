// Which instruction sets this CPU *and its operating system* can run.
//
// Detection is a pure function of the CPUID and XCR0 words, so tests can feed it faked machines.
#pragma once

#include <cstdint>
#include <string_view>

#include "isa.h"

namespace fastrec {

struct CpuWords {
  uint32_t max_leaf = 0;     // CPUID(0).eax
  uint32_t leaf1_ecx = 0;    // CPUID(1).ecx
  uint32_t leaf7_ebx = 0;    // CPUID(7,0).ebx
  uint32_t leaf7_ecx = 0;    // CPUID(7,0).ecx
  uint32_t leaf7_1_eax = 0;  // CPUID(7,1).eax
  uint64_t xcr0 = 0;         // XGETBV(0); 0 where OSXSAVE is off
};

CpuWords read_cpu_words();

// True if every feature of the target string is there and the OS saves its registers.
// A feature that the table does not know is never supported.
bool supports(const CpuWords& words, std::string_view target);

// Best instruction set that may be used: the machine's, or the forced ceiling if there is one.
Isa active_isa();
bool machine_has(Isa isa);
// The caller has checked machine_has(isa).
void force_isa(Isa isa);

// The first kernel of a list, newest first and ending with the scalar one, that may run now.
template <class Kernel, int count>
const Kernel& select_kernel(const Kernel* const (&newest_first)[count]) {
  for (const Kernel* kernel : newest_first)
    if (kernel->isa <= active_isa() && machine_has(kernel->isa)) return *kernel;
  return *newest_first[count - 1];
}

}  // namespace fastrec
