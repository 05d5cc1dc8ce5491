// What must hold between the programs of several GPUs: one that waits for what no other gives would hang.
#pragma once

#include <cstddef>
#include <cstdint>
#include <span>

#include "program_record.h"

namespace hetcomp::gpu {

// Throws Error(HETCOMP_BAD_ARTIFACT) unless all have the same number of flags and graphs of the same batch
// sizes, no hand-over is made twice, and between two GPUs the one raises each flag that the other awaits.
void require_match(std::span<const GpuProgramRecord* const> programs);

// Whether any of the program's graphs hands over to the CPU.
bool needs_cpu(const GpuProgramRecord& program);

// Hand-overs that all programs together make in the graphs that are for the same steps as `like`.
std::size_t count_hand_overs(std::span<const GpuProgramRecord* const> programs, const GraphRecord& like);

}  // namespace hetcomp::gpu
