// The buffers of a program on a GPU, with its weights loaded.
#pragma once

#include <cstddef>
#include <filesystem>
#include <map>
#include <memory>
#include <span>
#include <string>
#include <vector>

#include "cache_memory.h"
#include "device_memory.h"
#include "program_record.h"
#include "shared_memory.h"

namespace hetcomp::gpu {

// The context must be current when it is made and when it ends.
class ProgramBuffers {
 public:
  // shared: has the pinned buffers. verify: every piece of a file must have its XXH3. Throws Error. Memory is
  // zeroed and filled by the stream, which is at rest afterwards.
  ProgramBuffers(const CudaDriver& driver, const Device& device, const std::filesystem::path& artifact,
                 const GpuProgramRecord& program, const SharedMemory& shared, DeviceBudget& budget,
                 CUstream stream, bool verify);

  CUdeviceptr address(const BufferAddress& place) const { return addresses_[place.buffer] + place.offset; }

  // The host's side of a step buffer; empty for others. 256-byte aligned.
  std::span<std::byte> host(std::size_t buffer) const { return host_[buffer]; }

  // Before a step: see CacheMemory::provide. Nothing to do where all memory of the cache is there.
  void provide_cache(const std::map<std::int32_t, std::int64_t>& positions, const KvPool& pool) {
    if (cache_) cache_->provide(positions, pool);
  }

  // Copies all step buffers to the device: one copy, for they lie together.
  void send_step(CUstream stream) const;

 private:
  void place_step(const GpuProgramRecord& program, DeviceBudget& budget, CUstream stream);
  void load(const std::filesystem::path& artifact, const GpuProgramRecord& program, CUstream stream,
            bool verify);
  void load_stored(const BufferSource& source, const std::string& buffer, CUdeviceptr to,
                   const SourceFiles& sources, CUstream stream, bool verify);

  const CudaDriver& driver_;
  std::vector<DeviceMemory> memories_;
  std::unique_ptr<CacheMemory> cache_;  // null: the program has no cache with granules
  DeviceMemory step_;
  PinnedMemory step_host_;
  std::vector<CUdeviceptr> addresses_;
  std::vector<std::span<std::byte>> host_;
};

}  // namespace hetcomp::gpu
