// SHA-256 (FIPS 180-4), with the CPU's instructions for it where there are any.
#pragma once

#include <array>
#include <cstddef>
#include <cstdint>
#include <string>

namespace fastrec::engine {

using Sha256 = std::array<uint8_t, 32>;

Sha256 sha256(const std::byte* data, size_t bytes);
std::string hexadecimal(const Sha256& digest);

// Plain C++, as the reference of the other.
Sha256 sha256_scalar(const std::byte* data, size_t bytes);

}  // namespace fastrec::engine
