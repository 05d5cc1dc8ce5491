// Where the CPU's weights lie in the host's memory, expert by expert: what is copied to the GPU.
#pragma once

#include <cstdint>
#include <span>
#include <vector>

#include "program_record.h"

namespace hetcomp::gpu {

// By expert; null: not the CPU's.
using ExpertAddresses = std::vector<const std::uint8_t*>;

// Of each layer's operands. program: with a stream. weights: the CPU's, in the manifest's order. Throws
// Error: a source lies beyond its weight.
std::vector<std::vector<ExpertAddresses>> expert_sources(
    const GpuProgramRecord& program, std::span<const std::span<const std::uint8_t>> weights);

}  // namespace hetcomp::gpu
