#include "engine/file.h"

#include <fcntl.h>
#include <sys/mman.h>
#include <sys/stat.h>
#include <unistd.h>

#include <algorithm>
#include <bit>
#include <cerrno>
#include <cstring>
#include <new>

#include "cpu_features.h"
#include "engine/sha256.h"
#include "isa.h"

namespace fastrec::engine {
namespace {

static_assert(std::endian::native == std::endian::little, "engine files are little-endian");

constexpr char kMagic[] =
    "\x89"
    "fastrec";
constexpr int64_t kLine = 64;
constexpr int64_t kMaxHeader = 1 << 24;
constexpr std::align_val_t kAlignment{64};

struct Prefix {
  char magic[8];
  uint32_t version, zero;
  uint64_t header_bytes, file_bytes;
};
static_assert(sizeof(Prefix) == 32);
constexpr int64_t kPrefixBytes = 32, kDigestBytes = 32;

// A file's bytes; read by a system call they can't raise a signal where the file shrinks.
class File {
 public:
  explicit File(const std::string& path) : path_(path) {
    handle_ = open(path.c_str(), O_RDONLY | O_CLOEXEC);
    struct stat about;
    if (handle_ < 0 || fstat(handle_, &about) != 0) fail(std::strerror(errno));
    if (!S_ISREG(about.st_mode)) fail("no regular file");
    size_ = about.st_size;
  }
  File(const File&) = delete;
  ~File() {
    if (handle_ >= 0) close(handle_);
  }

  int64_t size() const { return size_; }
  int handle() const { return handle_; }

  // Reads all of it; false where the file is shorter now.
  bool read(std::byte* to, int64_t bytes, int64_t from) const {
    while (bytes > 0) {
      const ssize_t got = pread(handle_, to, bytes, from);
      if (got < 0 && errno == EINTR) continue;
      if (got < 0) fail(std::strerror(errno));
      if (got == 0) return false;
      to += got, from += got, bytes -= got;
    }
    return true;
  }

 private:
  [[noreturn]] void fail(const char* why) const {
    throw FileError(path_ + " is not an engine artifact: " + why);
  }

  const std::string path_;
  int handle_;
  int64_t size_ = 0;
};

std::shared_ptr<std::byte> allocated(int64_t bytes) {
  const auto free = [](std::byte* memory) { ::operator delete[](memory, kAlignment); };
  return {new (kAlignment) std::byte[std::max<int64_t>(bytes, 1)], free};
}

// The sections' bytes, from `begin` to the end of the file.
std::shared_ptr<std::byte> sections(const File& file, int64_t begin, int64_t bytes, Keep keep,
                                    const std::string& path) {
  if (keep == Keep::copied || bytes == 0) {
    std::shared_ptr<std::byte> memory = allocated(bytes);
    if (!file.read(memory.get(), bytes, begin)) throw FileError(path + " is truncated");
    return memory;
  }
  // A mapping begins on a page; sections lie at multiples of 64 bytes within it.
  void* const all = mmap(nullptr, begin + bytes, PROT_READ, MAP_PRIVATE, file.handle(), 0);
  if (all == MAP_FAILED) throw FileError(path + " cannot be mapped: " + std::strerror(errno));
  const int64_t length = begin + bytes;
  const auto unmap = [length](std::byte* memory) { munmap(memory, length); };
  const std::shared_ptr<std::byte> whole(static_cast<std::byte*>(all), unmap);
  return {whole, whole.get() + begin};
}

struct Held {
  std::shared_ptr<std::byte> sections;
  std::vector<std::shared_ptr<std::byte>> copies;
};

std::vector<Constant> constants_of(const json::Value& header, int64_t bytes,
                                   const std::shared_ptr<Held>& held, Keep keep,
                                   const std::string& path) {
  // Indices are read after they are checked, so they must not change with the file: a copy.
  std::vector<bool> is_index;
  for (const json::Value& buffer : header.at("program").at("buffers").list()) {
    if (buffer.at("space").text() != "constant" || buffer.at("dtype").text() != "int32") continue;
    const int64_t index = buffer.at("index").integer();
    if (index < 0 || index >= static_cast<int64_t>(header.at("sections").list().size()))
      throw InvalidProgram("a buffer of a constant that does not exist");
    is_index.resize(std::max<size_t>(is_index.size(), index + 1));
    is_index[index] = true;
  }
  std::vector<Constant> constants;
  int64_t end = 0;  // each byte belongs to one section, so no file is larger in memory than on disk
  for (const json::Value& row : header.at("sections").list()) {
    const int64_t begin = row.at("begin").integer(), size = row.at("bytes").integer();
    const int64_t padded = size < 0 || size > bytes ? -1 : (size + kLine - 1) / kLine * kLine;
    if (begin != end || padded < 0 || padded > bytes - begin)
      throw InvalidProgram("an invalid plan: sections that do not follow each other in the file");
    end += padded;
    const std::byte* data = held->sections.get() + begin;
    if (hexadecimal(sha256(data, padded)) != row.at("sha256").text())
      throw FileError(path + " was altered: the checksum of a section differs");
    if (keep == Keep::mapped && constants.size() < is_index.size() && is_index[constants.size()]) {
      held->copies.push_back(allocated(size));
      std::memcpy(held->copies.back().get(), data, size);
      data = held->copies.back().get();
    }
    constants.push_back({data, size});
  }
  if (end != bytes) throw InvalidProgram("an invalid plan: bytes behind the last section");
  return constants;
}

void require_machine(const json::Value& header, const std::string& path) {
  const std::string& name = header.at("requires").text();
  for (const IsaInfo& info : kIsaTable)
    if (name == info.name && machine_has(info.isa)) return;
  throw Refused(path + " needs the instruction set " + name + ", which this CPU lacks");
}

}  // namespace

OpenedFile open_file(const std::string& path, Keep keep) {
  const File file(path);
  std::byte start[kPrefixBytes + kDigestBytes];
  const int64_t there = std::min<int64_t>(file.size(), sizeof(start));
  if (!file.read(start, there, 0)) throw FileError(path + " is truncated");
  Prefix prefix;
  std::memcpy(&prefix, start, std::min<size_t>(there, sizeof(prefix)));
  const size_t known = std::min<size_t>(there, sizeof(prefix.magic));
  if (std::memcmp(start, kMagic, known) != 0) throw FileError(path + " is not an engine artifact");
  if (there < static_cast<int64_t>(sizeof(start)))
    throw FileError(path + " is truncated: " + std::to_string(file.size()) + " bytes");
  if (prefix.version != kFileVersion)
    throw FileError(path + " has version " + std::to_string(prefix.version) + ", this reads " +
                    std::to_string(kFileVersion) +
                    (prefix.version < kFileVersion ? ": compile the model again and save the engine"
                                                   : ": install a newer fastrec"));
  const uint64_t size = file.size(), begin = sizeof(start) + prefix.header_bytes;
  if (prefix.zero || prefix.header_bytes > kMaxHeader || begin > prefix.file_bytes ||
      size > prefix.file_bytes)
    throw FileError(path + " was altered: its sizes disagree");
  if (size < prefix.file_bytes)
    throw FileError(path + " is truncated: " + std::to_string(size) + " of " +
                    std::to_string(prefix.file_bytes) + " bytes");
  std::string summed(kPrefixBytes + prefix.header_bytes, '\0');
  std::memcpy(summed.data(), start, kPrefixBytes);
  if (!file.read(reinterpret_cast<std::byte*>(summed.data()) + kPrefixBytes, prefix.header_bytes,
                 sizeof(start)))
    throw FileError(path + " is truncated");
  const Sha256 digest = sha256(reinterpret_cast<const std::byte*>(summed.data()), summed.size());
  if (std::memcmp(digest.data(), start + kPrefixBytes, kDigestBytes) != 0)
    throw FileError(path + " was altered: its header's checksum differs");
  OpenedFile opened;
  opened.header = summed.substr(kPrefixBytes);
  json::Value header;
  try {
    header = json::parse(opened.header);
    header.object();
  } catch (const json::Error& error) {
    throw FileError(path + ": an invalid header: " + error.what());
  }
  try {
    require_machine(header, path);
    if (header.at("backend").text() != "native") throw InvalidProgram("another backend");
    const auto held = std::make_shared<Held>();
    const int64_t bytes = static_cast<int64_t>(size - begin);
    held->sections = sections(file, static_cast<int64_t>(begin), bytes, keep, path);
    std::vector<Constant> constants = constants_of(header, bytes, held, keep, path);
    opened.engine = std::make_unique<Engine>(header, std::move(constants), held);
    if (!opened.engine->gives_scores()) throw InvalidProgram("an invalid plan: one float32 output");
  } catch (const json::Error& error) {
    throw FileError(path + ": an invalid plan: " + error.what());
  } catch (const InvalidProgram& error) {
    throw FileError(path + ": " + error.what());
  } catch (const std::invalid_argument& error) {
    throw FileError(path + ": an invalid plan: " + error.what());
  }
  return opened;
}

}  // namespace fastrec::engine
