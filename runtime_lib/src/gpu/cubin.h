// A cubin of an artifact: GPU code, checked before the driver sees it.
#pragma once

#include <cstddef>
#include <filesystem>
#include <span>
#include <string>
#include <vector>

#include "kernel_table.h"

namespace hetcomp::gpu {

// Throws Error(HETCOMP_BAD_ARTIFACT) unless `bytes` are a 64-bit ELF file for NVIDIA GPUs whose tables and
// sections lie inside: the driver is given an address without a size, and would read beyond the end of a
// shorter file.
void require_cubin(std::span<const std::byte> bytes, const std::string& where);

// The code of a kernel: a file inside the artifact's gpu/, of a bounded size, with the SHA-256 of
// kernels.json.
std::vector<std::byte> read_cubin(const std::filesystem::path& artifact, const KernelRecord& kernel);

}  // namespace hetcomp::gpu
