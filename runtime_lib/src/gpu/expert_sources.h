// Where the CPU's weights lie in the host's memory, expert by expert: what is copied to the GPU.
#pragma once

#include <cstdint>
#include <span>
#include <vector>

#include "stream_record.h"

namespace hetcomp::gpu {

// The CPU's weights in memory: `regions` is what they lie in.
struct HostWeights {
  std::vector<std::span<const std::uint8_t>> weights;  // in the manifest's order
  std::vector<std::span<const std::uint8_t>> regions;
};

// By expert; null: not the CPU's.
using ExpertAddresses = std::vector<const std::uint8_t*>;

// Of each layer's operands. Throws Error: a source lies beyond its weight.
std::vector<std::vector<ExpertAddresses>> expert_sources(const StreamRecord& record,
                                                         const HostWeights& weights);

}  // namespace hetcomp::gpu
