// Engine files: a prefix, a JSON header, and the constants, which are mapped or read.
//
//   prefix, 32 + 32 bytes   magic, version, 0, bytes of the header, bytes of the file
//   (little-endian:
//                           8s u32 u32 u64 u64), SHA-256 of those 32 bytes and the header
//   header                  JSON: "backend", "precision", "threads", "spec", "requires", "program"
//                           (program.h), and "sections": {"begin", "bytes", "sha256"} of each
//                           constant; what else it says is for the front end
//   sections                one behind the other, each padded to a multiple of 64 bytes
//
// Nothing in it is executed. Sums, then the program are checked before it runs: a file whose sums
// are right may still be hostile. Memory is bounded by the file's own size.
#pragma once

#include <memory>
#include <stdexcept>
#include <string>

#include "engine/engine.h"

namespace fastrec::engine {

inline constexpr uint32_t kFileVersion = 2;

// A file that cannot be opened, is no engine, is truncated or altered, or is not sound.
class FileError : public std::runtime_error {
  using std::runtime_error::runtime_error;
};

// How an engine keeps the constants of its file.
enum class Keep {
  mapped,  // processes that open one file share its pages; it must not be changed in place
  copied,  // memory of its own: a change of the file changes nothing
};

struct OpenedFile {
  std::string header;
  std::unique_ptr<Engine> engine;
};

// Throws FileError, or Refused where this machine lacks what the file requires.
OpenedFile open_file(const std::string& path, Keep keep);

}  // namespace fastrec::engine
