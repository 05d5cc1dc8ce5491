// The weights of an artifact in memory.
#pragma once

#include <cstdint>
#include <filesystem>
#include <vector>

#include "manifest.h"
#include "memory.h"

namespace hetcomp {

enum class Residency { kMapped, kRam };

class Weights {
 public:
  // Reads with `threads` threads. verify: every tensor must have its XXH3. Throws Error.
  Weights(const std::filesystem::path& artifact, const Manifest& manifest, Residency residency, bool verify,
          int threads);

  // One address a weight, in the manifest's order.
  const std::vector<const std::uint8_t*>& addresses() const { return addresses_; }
  std::uint64_t bytes() const { return bytes_; }
  Residency residency() const { return residency_; }

  // Bytes that kRam needs for them.
  static std::uint64_t ram_bytes(const Manifest& manifest);

 private:
  Residency residency_;
  std::uint64_t bytes_ = 0;
  Memory ram_;
  std::vector<MappedFile> mapped_;
  std::vector<const std::uint8_t*> addresses_;
};

}  // namespace hetcomp
