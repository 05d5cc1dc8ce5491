// The CPU's weights in memory, from which experts are copied to GPUs.
#pragma once

#include <cstdint>
#include <functional>
#include <span>
#include <string>
#include <vector>

namespace hetcomp::gpu {

struct HostWeights {
  std::vector<std::span<const std::uint8_t>> weights;  // in the manifest's order
  std::vector<std::span<const std::uint8_t>> regions;  // what they lie in
  std::string pageable{};                              // why they must not be pinned; empty: they may be
  // Whether all that was read of them is theirs: mapped files may fail. Any thread may ask.
  std::function<bool()> good = [] { return true; };
};

}  // namespace hetcomp::gpu
