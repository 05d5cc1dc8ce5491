// The KV cache on a GPU: addresses for all positions of all slots, memory behind those that sequences hold.
#pragma once

#include <cstdint>
#include <map>
#include <vector>

#include "../kv_pool.h"
#include "device_memory.h"
#include "program_record.h"

namespace hetcomp::gpu {

// The context must be current when it is made, used and ended. Memory is mapped and unmapped, so the GPU must
// be at rest then.
class CacheMemory {
 public:
  // Takes all memory that it will ever have. record: of a program with granules. Throws Error.
  CacheMemory(const CudaDriver& driver, const Device& device, DeviceBudget& budget, std::uint64_t bytes,
              const CacheRecord& record);
  ~CacheMemory();
  CacheMemory(const CacheMemory&) = delete;
  CacheMemory& operator=(const CacheMemory&) = delete;

  CUdeviceptr address() const { return base_; }

  // What lies below the position of each slot has memory from now on. It is taken from slots that have more
  // than they hold of the pool, if it must be. Throws Error.
  void provide(const std::map<std::int32_t, std::int64_t>& positions, const KvPool& pool);

 private:
  struct Slot {
    CUdeviceptr begin;
    std::vector<GranuleHandle> granules;  // mapped from begin on
  };

  std::uint64_t granules_for(std::int64_t positions) const;
  void grow(Slot& slot, std::uint64_t granules, const KvPool& pool);
  void reclaim(const KvPool& pool);
  void cut(Slot& slot, std::uint64_t granules);

  const CudaDriver& driver_;
  const CUdevice device_;
  const CacheRecord record_;
  const std::uint64_t bytes_;
  CUdeviceptr base_ = 0;
  std::vector<GranuleHandle> free_;
  std::vector<Slot> slots_;  // the last one is the block for rows of nobody
};

}  // namespace hetcomp::gpu
