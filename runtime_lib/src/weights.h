// The weights of an artifact in memory.
#pragma once

#include <cstdint>
#include <filesystem>
#include <map>
#include <span>
#include <string>
#include <vector>

#include "manifest.h"
#include "mapped_file.h"
#include "memory.h"
#include "node_map.h"

namespace hetcomp {

enum class Residency { kMapped, kRam };

class Weights {
 public:
  // nodes: one for each of the manifest's. In RAM every node's weights are in a memory of its own, bound to
  // the machine's node and first touched by its threads, which also do the reading. verify: every tensor must
  // have its XXH3; those of sources that were touched must in any case. Throws Error.
  Weights(const std::filesystem::path& artifact, const Manifest& manifest, Residency residency, bool verify,
          const std::vector<NodePlace>& nodes);

  // One address a weight, in the manifest's order.
  const std::vector<const std::uint8_t*>& addresses() const { return addresses_; }
  // What all weights lie in.
  std::vector<std::span<const std::uint8_t>> regions() const;
  std::uint64_t bytes() const;
  // By node, in the manifest's order.
  const std::vector<std::uint64_t>& node_bytes() const { return node_bytes_; }
  Residency residency() const { return residency_; }
  // False: the kernel refused to bind memory to a node.
  bool bound() const;

  // Bytes of memory for each node's weights: mapped are those that can be, the others are in RAM all the
  // same.
  static std::vector<std::uint64_t> ram_bytes(const Manifest& manifest, Residency residency);
  // Throws Error(HETCOMP_OUT_OF_MEMORY) if what cannot be mapped and `others` need more than is available.
  static void require_room_for_repacked(const Manifest& manifest, std::uint64_t others,
                                        std::uint64_t available);

  // Whether all that was read of mapped weights is what the files have. Any thread may ask.
  bool good() const;
  // Throws Error(HETCOMP_IO) naming the weight if not; later reads see the file as it is then. Nobody may be
  // reading. manifest: the constructor's.
  void require_good(const Manifest& manifest);

 private:
  Residency residency_;
  std::vector<std::uint64_t> node_bytes_;
  std::vector<Memory> ram_;
  std::map<std::string, MappedFile> mapped_;  // by name in the manifest
  std::vector<const std::uint8_t*> addresses_;
};

}  // namespace hetcomp
