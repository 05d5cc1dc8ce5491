// An open file that is read at offsets.
#pragma once

#include <cstddef>
#include <cstdint>
#include <filesystem>
#include <span>
#include <string>
#include <utility>

namespace hetcomp {

// Errors throw Error with the file's name.
class File {
 public:
  explicit File(const std::filesystem::path& path);
  ~File();
  File(File&& other) noexcept
      : path_(std::move(other.path_)), fd_(std::exchange(other.fd_, -1)), size_(other.size_) {}
  File& operator=(File&&) = delete;

  int descriptor() const { return fd_; }
  std::uint64_t size() const { return size_; }
  const std::filesystem::path& path() const { return path_; }

  // Fills `out`; a file that ends earlier is an error.
  void read(std::uint64_t offset, std::span<std::byte> out) const;
  std::string text() const;
  std::string sha256() const;  // lower-case hex

 private:
  std::filesystem::path path_;
  int fd_;
  std::uint64_t size_;
};

std::string sha256(std::span<const std::byte> bytes);  // lower-case hex

// The place of `file` in an artifact; refuses a file that is not there and links that lead out of the
// artifact.
std::filesystem::path inside(const std::filesystem::path& artifact, const std::string& file);

}  // namespace hetcomp
