// Integers by width, for NVRTC too, which has no <cstdint>.
#pragma once

#if defined(__CUDACC_RTC__)
namespace fastrec {
using int8_t = signed char;
using uint8_t = unsigned char;
using int16_t = short;
using uint16_t = unsigned short;
using int32_t = int;
using uint32_t = unsigned int;
using int64_t = long long;
using uint64_t = unsigned long long;
}  // namespace fastrec
#else
#include <cstdint>
namespace fastrec {
using std::int16_t;
using std::int32_t;
using std::int64_t;
using std::int8_t;
using std::uint16_t;
using std::uint32_t;
using std::uint64_t;
using std::uint8_t;
}  // namespace fastrec
#endif

// For functions that host compilers see too.
#if defined(__CUDACC__) || defined(__CUDACC_RTC__)
#define FASTREC_HOST_DEVICE __host__ __device__
#else
#define FASTREC_HOST_DEVICE
#endif
