#include "cache_memory.h"

#include <algorithm>

#include "../status.h"

namespace hetcomp::gpu {
namespace {

CUmemAllocationProp memory_of(CUdevice device) {
  CUmemAllocationProp properties{};
  properties.type = CU_MEM_ALLOCATION_TYPE_PINNED;
  properties.location = {CU_MEM_LOCATION_TYPE_DEVICE, device};
  return properties;
}

void require_granules(const CudaDriver& driver, const Device& device, std::uint64_t bytes) {
  int supported = 0;
  driver.device_attribute(&supported, CU_DEVICE_ATTRIBUTE_VIRTUAL_MEMORY_MANAGEMENT_SUPPORTED, device.id);
  const CUmemAllocationProp properties = memory_of(device.id);
  std::size_t granularity = 0;
  if (supported != 0) driver.granularity(&granularity, &properties, CU_MEM_ALLOC_GRANULARITY_MINIMUM);
  if (supported != 0 && granularity > 0 && bytes % granularity == 0) return;
  throw Error(HETCOMP_MISSING_ISA,
              device.name + " cannot map memory in pieces of " + in_words(bytes) +
                  ", which a KV cache that sequences share needs: compile the model without --kv-tokens.");
}

}  // namespace

CacheMemory::CacheMemory(const CudaDriver& driver, const Device& device, DeviceBudget& budget,
                         std::uint64_t bytes, const CacheRecord& record)
    : driver_(driver), device_(device.id), record_(record), bytes_(bytes) {
  require_granules(driver, device, record.granule_bytes);
  budget.take(record.granules * record.granule_bytes, "the KV cache");
  const CUmemAllocationProp properties = memory_of(device_);
  for (std::uint64_t i = 0; i < record.granules; ++i) {
    CUmemGenericAllocationHandle granule = 0;
    const CUresult result = driver.granule_create.raw(&granule, record.granule_bytes, &properties, 0);
    if (result == CUDA_ERROR_OUT_OF_MEMORY) {
      throw Error(HETCOMP_OUT_OF_MEMORY,
                  "The GPU has no " + in_words(record.granules * record.granule_bytes) +
                      " left for the KV cache: another process has taken memory since the check; end it, or "
                      "compile the model with a smaller --kv-tokens.");
    }
    driver.granule_create.require(result, "allocating the KV cache");
    free_.emplace_back(driver, granule);
  }
  for (std::int64_t slot = 0; slot <= record.slots; ++slot) slots_.push_back({0, {}});
  driver.addresses_reserve(&base_, bytes, 0, 0, 0);
  for (std::size_t slot = 0; slot < slots_.size(); ++slot)
    slots_[slot].begin = base_ + slot * record.slot_bytes;
  try {
    const KvPool nobody(record.slots, 0);
    grow(slots_.back(), granules_for(1), nobody);
  } catch (...) {
    driver.addresses_free.raw(base_, bytes);
    throw;
  }
}

CacheMemory::~CacheMemory() {
  for (Slot& slot : slots_)
    if (!slot.granules.empty())
      driver_.memory_unmap.raw(slot.begin, slot.granules.size() * record_.granule_bytes);
  driver_.addresses_free.raw(base_, bytes_);
}

std::uint64_t CacheMemory::granules_for(std::int64_t positions) const {
  const auto up = [](std::uint64_t n, std::uint64_t unit) { return (n + unit - 1) / unit; };
  const std::uint64_t blocks = up(static_cast<std::uint64_t>(positions), record_.block_positions);
  return up(blocks * record_.block_bytes, record_.granule_bytes);
}

void CacheMemory::provide(const std::map<std::int32_t, std::int64_t>& positions, const KvPool& pool) {
  for (const auto& [slot, end] : positions)
    grow(slots_[static_cast<std::size_t>(slot)], granules_for(end), pool);
}

void CacheMemory::grow(Slot& slot, std::uint64_t granules, const KvPool& pool) {
  const std::uint64_t before = slot.granules.size();
  if (granules <= before) return;
  if (granules - before > free_.size()) reclaim(pool);
  if (granules - before > free_.size())
    throw Error(HETCOMP_INTERNAL, "The KV cache has no memory for positions of its pool; report this bug.");
  const std::uint64_t size = record_.granule_bytes;
  const CUdeviceptr begin = slot.begin + before * size;
  const CUmemAccessDesc access{{CU_MEM_LOCATION_TYPE_DEVICE, device_}, CU_MEM_ACCESS_FLAGS_PROT_READWRITE};
  try {
    while (slot.granules.size() < granules) {
      driver_.memory_map(slot.begin + slot.granules.size() * size, size, 0, free_.back().get(), 0);
      slot.granules.push_back(std::move(free_.back()));
      free_.pop_back();
    }
    driver_.memory_allow(begin, (granules - before) * size, &access, 1);
  } catch (...) {
    cut(slot, before);
    throw;
  }
}

// A slot holds at least what its sequence has; so it will again, for the pool knows who has how much.
void CacheMemory::reclaim(const KvPool& pool) {
  for (std::size_t slot = 0; slot + 1 < slots_.size(); ++slot)
    cut(slots_[slot], granules_for(pool.held(static_cast<std::int32_t>(slot))));
}

void CacheMemory::cut(Slot& slot, std::uint64_t granules) {
  if (slot.granules.size() <= granules) return;
  const std::uint64_t more = slot.granules.size() - granules;
  driver_.memory_unmap(slot.begin + granules * record_.granule_bytes, more * record_.granule_bytes);
  std::move(slot.granules.end() - static_cast<std::ptrdiff_t>(more), slot.granules.end(),
            std::back_inserter(free_));
  slot.granules.resize(granules);
}

}  // namespace hetcomp::gpu
