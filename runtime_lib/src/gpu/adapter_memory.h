// The pairs of adapters in a GPU's memory, and the table by which kernels find them.
#pragma once

#include <cstdint>
#include <span>
#include <vector>

#include "../adapter.h"
#include "driver.h"
#include "program_buffers.h"

namespace hetcomp::gpu {

// The context must be current, and the GPU at rest.
class AdapterMemory {
 public:
  // Both must outlive it; of a program with adapters.
  AdapterMemory(const CudaDriver& driver, const GpuProgramRecord& program, const ProgramBuffers& buffers,
                CUstream stream);

  // Gives the slot to an adapter with these pairs, whose bytes go to the memory from `begin` on. Throws
  // Error.
  void put(std::int32_t slot, std::uint64_t begin, std::span<const GpuPair> pairs);

  // Bytes that pairs take.
  static std::uint64_t bytes(std::span<const GpuPair> pairs);

 private:
  const CudaDriver& driver_;
  const AdapterRecord& record_;
  const CUdeviceptr pairs_;
  const CUdeviceptr table_address_;
  const CUstream stream_;
  std::vector<std::int64_t> table_;
};

}  // namespace hetcomp::gpu
