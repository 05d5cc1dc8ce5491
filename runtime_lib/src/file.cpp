#include "file.h"

#include <fcntl.h>
#include <sys/stat.h>
#include <sys/types.h>
#include <unistd.h>
// libmd's header needs sys/types.h before it.
#include <sha256.h>

#include <algorithm>
#include <array>
#include <cerrno>
#include <cstring>
#include <vector>

#include "status.h"

namespace hetcomp {
namespace {

[[noreturn]] void fail(const std::filesystem::path& path, const char* what) {
  const int error = errno;
  throw Error(error == ENOENT ? HETCOMP_NOT_FOUND : HETCOMP_IO,
              "Cannot " + std::string(what) + " " + path.string() + ": " + std::strerror(error) + ".");
}

std::string digest(SHA2_CTX& context) {
  std::array<std::uint8_t, SHA256_DIGEST_LENGTH> digest{};
  SHA256Final(digest.data(), &context);
  constexpr std::string_view kDigits = "0123456789abcdef";
  std::string hex;
  for (const std::uint8_t byte : digest) {
    hex += kDigits[byte >> 4];
    hex += kDigits[byte & 15];
  }
  return hex;
}

}  // namespace

File::File(const std::filesystem::path& path) : path_(path), fd_(open(path.c_str(), O_RDONLY | O_CLOEXEC)) {
  if (fd_ < 0) fail(path, "open");
  struct stat info{};
  if (fstat(fd_, &info) != 0) {
    const int error = errno;
    close(fd_);
    errno = error;
    fail(path, "examine");
  }
  if (!S_ISREG(info.st_mode)) {
    close(fd_);
    throw Error(HETCOMP_BAD_ARTIFACT, path.string() + " is not a regular file.");
  }
  size_ = static_cast<std::uint64_t>(info.st_size);
}

File::~File() {
  if (fd_ >= 0) close(fd_);
}

void File::read(std::uint64_t offset, std::span<std::byte> out) const {
  while (!out.empty()) {
    const ssize_t n = pread(fd_, out.data(), out.size(), static_cast<off_t>(offset));
    if (n < 0 && errno == EINTR) continue;
    if (n < 0) fail(path_, "read");
    if (n == 0)
      throw Error(HETCOMP_BAD_ARTIFACT, path_.string() + " ends at byte " + std::to_string(offset) +
                                            ", earlier than expected; copy the artifact again.");
    out = out.subspan(static_cast<std::size_t>(n));
    offset += static_cast<std::uint64_t>(n);
  }
}

std::string File::text() const {
  std::string text(size_, '\0');
  read(0, std::as_writable_bytes(std::span(text)));
  return text;
}

std::string File::sha256() const {
  SHA2_CTX context;
  SHA256Init(&context);
  std::vector<std::byte> buffer(std::min<std::uint64_t>(size_, 1 << 20));
  for (std::uint64_t offset = 0; offset < size_;) {
    const std::span chunk(buffer.data(), std::min<std::uint64_t>(buffer.size(), size_ - offset));
    read(offset, chunk);
    SHA256Update(&context, reinterpret_cast<const std::uint8_t*>(chunk.data()), chunk.size());
    offset += chunk.size();
  }
  return digest(context);
}

std::string sha256(std::span<const std::byte> bytes) {
  SHA2_CTX context;
  SHA256Init(&context);
  SHA256Update(&context, reinterpret_cast<const std::uint8_t*>(bytes.data()), bytes.size());
  return digest(context);
}

std::filesystem::path inside(const std::filesystem::path& artifact, const std::string& file) {
  std::error_code error;
  const std::filesystem::path root = std::filesystem::canonical(artifact, error);
  if (error)
    throw Error(HETCOMP_NOT_FOUND, "Cannot open " + artifact.string() + ": " + error.message() + ".");
  std::filesystem::path path = std::filesystem::canonical(artifact / file, error);
  if (error) {
    throw Error(HETCOMP_BAD_ARTIFACT, "The artifact " + artifact.string() + " lacks its file " + file + " (" +
                                          error.message() + "); copy the artifact anew.");
  }
  if (std::mismatch(root.begin(), root.end(), path.begin(), path.end()).first != root.end()) {
    throw Error(HETCOMP_BAD_ARTIFACT,
                "The file " + file + " of the artifact " + artifact.string() +
                    " is a link to a place outside of it; copy the artifact with its files.");
  }
  return path;
}

}  // namespace hetcomp
