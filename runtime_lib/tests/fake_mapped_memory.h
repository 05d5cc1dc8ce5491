// Memory of the fake device that has addresses only where it is mapped; everywhere else an access is a fault.
#pragma once

#include <sys/mman.h>
#include <unistd.h>

#include <atomic>
#include <cstddef>
#include <cstdint>
#include <map>
#include <mutex>
#include <set>
#include <vector>

#include "cuda_api.h"

// Counts a call, which may have to fail (FakeCuda::fail_call).
CUresult fake_counted();

namespace fake_mapped_memory {

inline std::atomic<int> graphs_running{0};  // what is mapped must not change then

constexpr std::size_t kGranule = std::size_t{2} << 20;

struct Area {
  std::uint64_t begin, end;
};

class Reservations {
 public:
  // 0: refused.
  std::uint64_t reserve(std::size_t bytes) {
    if (bytes == 0 || bytes % kGranule != 0) return 0;
    void* all = mmap(nullptr, bytes + kGranule, PROT_NONE, kQuiet, -1, 0);
    if (all == MAP_FAILED) return 0;
    const auto from = reinterpret_cast<std::uint64_t>(all);
    const std::uint64_t begin = (from + kGranule - 1) / kGranule * kGranule;
    if (begin > from) munmap(all, begin - from);
    munmap(reinterpret_cast<void*>(begin + bytes), from + kGranule - begin);
    const std::lock_guard lock(mutex_);
    reserved_[begin] = bytes;
    return begin;
  }
  // False: it is not what was reserved, or something is still mapped there.
  bool free(std::uint64_t begin, std::size_t bytes) {
    const std::lock_guard lock(mutex_);
    const auto found = reserved_.find(begin);
    if (found == reserved_.end() || found->second != bytes || !mapped_in(begin, bytes).empty()) return false;
    munmap(reinterpret_cast<void*>(begin), bytes);
    reserved_.erase(found);
    return true;
  }

  // Handles are descriptors of memory files.
  std::uint64_t create(std::size_t bytes) {
    if (bytes == 0 || bytes % kGranule != 0) return 0;
    const int file = memfd_create("granule", 0);
    if (file < 0 || ftruncate(file, static_cast<off_t>(bytes)) != 0) return 0;
    const std::lock_guard lock(mutex_);
    created_[static_cast<std::uint64_t>(file)] = bytes;
    return static_cast<std::uint64_t>(file);
  }
  std::size_t release(std::uint64_t handle) {
    const std::lock_guard lock(mutex_);
    const auto found = created_.find(handle);
    if (found == created_.end()) return 0;
    const std::size_t bytes = found->second;
    created_.erase(found);
    close(static_cast<int>(handle));
    return bytes;
  }

  bool map(std::uint64_t at, std::size_t bytes, std::uint64_t handle) {
    const std::lock_guard lock(mutex_);
    const auto found = created_.find(handle);
    if (found == created_.end() || found->second != bytes || !inside(at, bytes)) return false;
    if (!mapped_in(at, bytes).empty() || !in_use_.insert(handle).second) return false;
    mmap(reinterpret_cast<void*>(at), bytes, PROT_NONE, MAP_SHARED | MAP_FIXED, static_cast<int>(handle), 0);
    mapped_[at] = {bytes, handle, false};
    return true;
  }
  bool allow(std::uint64_t at, std::size_t bytes) {
    const std::lock_guard lock(mutex_);
    const std::vector<std::uint64_t> all = mapped_in(at, bytes);
    if (all.size() * kGranule != bytes) return false;
    for (const std::uint64_t begin : all) mapped_[begin].allowed = true;
    return mprotect(reinterpret_cast<void*>(at), bytes, PROT_READ | PROT_WRITE) == 0;
  }
  bool unmap(std::uint64_t at, std::size_t bytes) {
    const std::lock_guard lock(mutex_);
    const std::vector<std::uint64_t> all = mapped_in(at, bytes);
    if (all.empty() || all.size() * kGranule != bytes) return false;
    for (const std::uint64_t begin : all) {
      in_use_.erase(mapped_[begin].handle);
      mapped_.erase(begin);
    }
    return mmap(reinterpret_cast<void*>(at), bytes, PROT_NONE, kQuiet | MAP_FIXED, -1, 0) != MAP_FAILED;
  }

  // What may be used of the reservation that an address is in; false: it is in none.
  bool areas(std::uint64_t address, std::vector<Area>& found) {
    const std::lock_guard lock(mutex_);
    const auto above = reserved_.upper_bound(address);
    if (above == reserved_.begin()) return false;
    const auto [begin, bytes] = *std::prev(above);
    if (address - begin >= bytes) return false;
    for (const std::uint64_t at : mapped_in(begin, bytes)) {
      if (!mapped_[at].allowed) continue;
      if (!found.empty() && found.back().end == at)
        found.back().end += kGranule;
      else
        found.push_back({at, at + kGranule});
    }
    return true;
  }

 private:
  struct Mapped {
    std::size_t bytes;
    std::uint64_t handle;
    bool allowed;
  };
  static constexpr int kQuiet = MAP_PRIVATE | MAP_ANONYMOUS | MAP_NORESERVE;

  bool inside(std::uint64_t at, std::size_t bytes) const {
    const auto above = reserved_.upper_bound(at);
    if (above == reserved_.begin()) return false;
    const auto [begin, size] = *std::prev(above);
    return at % kGranule == 0 && at - begin < size && bytes <= size - (at - begin);
  }
  std::vector<std::uint64_t> mapped_in(std::uint64_t at, std::size_t bytes) const {
    std::vector<std::uint64_t> found;
    for (auto each = mapped_.lower_bound(at); each != mapped_.end() && each->first < at + bytes; ++each)
      found.push_back(each->first);
    return found;
  }

  std::mutex mutex_;
  std::map<std::uint64_t, std::size_t> reserved_;  // address, bytes
  std::map<std::uint64_t, std::size_t> created_;   // handle, bytes
  std::set<std::uint64_t> in_use_;                 // handles: at one place at most
  std::map<std::uint64_t, Mapped> mapped_;         // by address, a granule each
};

inline Reservations reservations;

}  // namespace fake_mapped_memory
