// Memory that the runtime asks the operating system for, and how much of it there is.
#pragma once

#include <cstddef>
#include <cstdint>
#include <string>
#include <utility>

#include "numa.h"

namespace hetcomp {

inline constexpr std::size_t kPageBytes = 4096;  // on x86

// Small: where what is touched must not bring much of its neighbourhood with it.
enum class Pages { kHuge, kSmall };

// Zeroed anonymous memory, 2 MB aligned and, if wanted, in huge pages where the system gives them.
class Memory {
 public:
  Memory() = default;
  // node: the NUMA node that its pages come from; the kernel may refuse, see bound(). Throws Error with
  // `purpose` in the sentence.
  Memory(std::size_t bytes, const std::string& purpose, int node = kNoNode, Pages pages = Pages::kHuge);
  // The system may take the pages that lie in [begin, end) whole: they read as zeros then.
  void give_back(std::size_t begin, std::size_t end);
  ~Memory();
  Memory(Memory&& other) noexcept
      : base_(std::exchange(other.base_, nullptr)),
        mapped_(std::exchange(other.mapped_, 0)),
        data_(std::exchange(other.data_, nullptr)),
        size_(std::exchange(other.size_, 0)),
        bound_(std::exchange(other.bound_, true)) {}
  Memory& operator=(Memory&& other) noexcept;

  std::uint8_t* data() const { return data_; }
  std::size_t size() const { return size_; }
  // False: a node was asked for and refused; pages come from the node of the thread that touches them first.
  bool bound() const { return bound_; }

 private:
  void* base_ = nullptr;
  std::size_t mapped_ = 0;
  std::uint8_t* data_ = nullptr;
  std::size_t size_ = 0;
  bool bound_ = true;
};

// Bytes this process can still use: the system's available memory, and what is left under the limits of its
// cgroups (page cache does not count as used).
std::uint64_t available_memory();

}  // namespace hetcomp
