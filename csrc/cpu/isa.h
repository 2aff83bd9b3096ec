// The one table of instruction sets: name and compiler target.
//
// The target string is the single source of truth: kernels are compiled with it
// (`__attribute__((target(FASTREC_TARGET_avx512vnni)))`) and cpu_features.cpp requires the CPUID
// and XCR0 bits of every word in it, so that the two can never drift apart.
#pragma once

#define FASTREC_TARGET_scalar ""
#define FASTREC_TARGET_avx2 "avx2,fma,f16c"
#define FASTREC_TARGET_avxvnni "avx2,fma,f16c,avxvnni"
#define FASTREC_TARGET_avx512 "avx512f,avx512bw,avx512dq,avx512vl,fma,f16c"
#define FASTREC_TARGET_avx512vnni FASTREC_TARGET_avx512 ",avx512vnni"
#define FASTREC_TARGET_avx512bf16 FASTREC_TARGET_avx512vnni ",avx512bf16"

// Ordered from the oldest to the newest; a forced name is a ceiling (see cpu_features.h). A machine
// may lack one of the middle (Zen 4 has avx512vnni and no avxvnni): select_kernel passes it over.
#define FASTREC_ISA_TABLE(X) \
  X(scalar)                  \
  X(avx2)                    \
  X(avxvnni)                 \
  X(avx512)                  \
  X(avx512vnni)              \
  X(avx512bf16)

namespace fastrec {

enum class Isa : int {
#define FASTREC_ISA_ENUM(name) name,
  FASTREC_ISA_TABLE(FASTREC_ISA_ENUM)
#undef FASTREC_ISA_ENUM
};

struct IsaInfo {
  Isa isa;
  const char* name;
  const char* target;  // comma-separated features, as gcc spells them
};

inline constexpr IsaInfo kIsaTable[] = {
#define FASTREC_ISA_INFO(name) {Isa::name, #name, FASTREC_TARGET_##name},
    FASTREC_ISA_TABLE(FASTREC_ISA_INFO)
#undef FASTREC_ISA_INFO
};

}  // namespace fastrec
