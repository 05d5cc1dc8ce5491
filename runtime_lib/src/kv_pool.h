// Positions of the KV cache that all sequences of a model hold together.
#pragma once

#include <cstdint>
#include <mutex>
#include <span>
#include <vector>

namespace hetcomp {

// Thread safe.
class KvPool {
 public:
  KvPool(std::int32_t slots, std::int64_t positions)
      : positions_(positions), held_(static_cast<std::size_t>(slots)) {}

  struct Claim {
    std::int32_t slot;
    std::int64_t length;
  };
  // Each slot holds at least its length from now on; all of them or, with Error(HETCOMP_POOL_FULL), none.
  void claim(std::span<const Claim> claims);
  // The slot holds at most `length` from now on.
  void give_back(std::int32_t slot, std::int64_t length);

  std::int64_t held(std::int32_t slot) const;
  std::int64_t positions() const { return positions_; }

 private:
  [[noreturn]] void refuse(std::int64_t wanted) const;

  const std::int64_t positions_;
  mutable std::mutex mutex_;
  std::vector<std::int64_t> held_;  // by slot
  std::int64_t used_ = 0;           // their sum
};

}  // namespace hetcomp
