#include "memory.h"

#include <sys/mman.h>

#include <algorithm>
#include <cerrno>
#include <cstring>
#include <fstream>
#include <limits>

#include "cgroup.h"
#include "status.h"

namespace hetcomp {
namespace {

constexpr std::size_t kHugePage = 2U << 20;

std::uint64_t system_available() {
  std::ifstream info("/proc/meminfo");
  std::string key;
  std::uint64_t kilobytes = 0;
  std::string unit;
  while (info >> key >> kilobytes) {
    if (key == "MemAvailable:") return kilobytes * 1024;
    std::getline(info, unit);
  }
  return std::numeric_limits<std::uint64_t>::max();  // no /proc (a bare chroot): nothing is known
}

}  // namespace

Memory::Memory(std::size_t bytes, const std::string& purpose, int node, Pages pages) : size_(bytes) {
  if (bytes == 0) return;
  if (bytes > std::numeric_limits<std::size_t>::max() - 2 * kHugePage)
    throw Error(HETCOMP_OUT_OF_MEMORY, purpose + " is larger than the address space.");
  mapped_ = bytes + kHugePage;
  base_ = mmap(nullptr, mapped_, PROT_READ | PROT_WRITE, MAP_PRIVATE | MAP_ANONYMOUS | MAP_NORESERVE, -1, 0);
  if (base_ == MAP_FAILED) {
    base_ = nullptr;
    throw Error(HETCOMP_OUT_OF_MEMORY, "The system refuses " + in_words(bytes) + " of memory for " + purpose +
                                           ": " + std::strerror(errno) + ".");
  }
  const auto address = reinterpret_cast<std::uintptr_t>(base_);
  data_ = static_cast<std::uint8_t*>(base_) + (kHugePage - address % kHugePage) % kHugePage;
  // Advice: a system without huge pages runs slower, not wrong.
  if (bytes >= kHugePage) madvise(data_, bytes, pages == Pages::kHuge ? MADV_HUGEPAGE : MADV_NOHUGEPAGE);
  if (node != kNoNode) bound_ = bind_to_node(data_, bytes, node);
}

Memory::~Memory() {
  if (base_ != nullptr) munmap(base_, mapped_);
}

void Memory::give_back(std::size_t begin, std::size_t end) {
  begin = (begin + kPageBytes - 1) / kPageBytes * kPageBytes;
  end = end / kPageBytes * kPageBytes;
  if (begin < end) madvise(data_ + begin, end - begin, MADV_DONTNEED);
}

Memory& Memory::operator=(Memory&& other) noexcept {
  std::swap(base_, other.base_);
  std::swap(mapped_, other.mapped_);
  std::swap(data_, other.data_);
  std::swap(size_, other.size_);
  std::swap(bound_, other.bound_);
  return *this;
}

std::uint64_t available_memory() { return std::min(system_available(), cgroup_memory_left()); }

}  // namespace hetcomp
