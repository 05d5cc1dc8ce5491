// Memory of the fake driver: which device it belongs to, and who may use it.
#pragma once

#include <cstddef>
#include <cstdint>
#include <cstdlib>
#include <map>
#include <mutex>
#include <utility>
#include <vector>

#include "fake_mapped_memory.h"

namespace fake_memory {

constexpr int kEveryDevice = -1;

struct Memory {
  std::size_t bytes;
  int device;  // kEveryDevice: portable memory of the host
};
inline std::mutex memories_mutex;
inline std::map<std::uintptr_t, Memory> memories;  // of devices and the host that live, by address

inline void* allocated(std::size_t alignment, std::size_t bytes, int device) {
  void* memory = std::aligned_alloc(alignment, (bytes + alignment - 1) / alignment * alignment);
  const std::lock_guard lock(memories_mutex);
  memories[reinterpret_cast<std::uintptr_t>(memory)] = {bytes, device};
  return memory;
}
// The memory that an address lies in; null: none.
inline const std::pair<const std::uintptr_t, Memory>* memory_at(std::uintptr_t address) {
  const auto above = memories.upper_bound(address);
  if (above == memories.begin()) return nullptr;
  const auto& found = *std::prev(above);
  return address - found.first < found.second.bytes ? &found : nullptr;
}
// Whether the device may use the address: not that of another one's memory. With `must` it must be memory.
inline bool reaches(int device, std::uintptr_t address, bool must) {
  std::vector<fake_mapped_memory::Area> mapped;
  if (fake_mapped_memory::reservations.areas(address, mapped)) return true;
  const std::lock_guard lock(memories_mutex);
  const auto* memory = memory_at(address);
  if (memory == nullptr) return !must;
  return memory->second.device == device || memory->second.device == kEveryDevice;
}
inline void release(void* memory) {
  const std::lock_guard lock(memories_mutex);
  memories.erase(reinterpret_cast<std::uintptr_t>(memory));
  std::free(memory);
}

}  // namespace fake_memory
