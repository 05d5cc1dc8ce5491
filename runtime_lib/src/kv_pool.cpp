#include "kv_pool.h"

#include <algorithm>
#include <string>

#include "status.h"

namespace hetcomp {

void KvPool::claim(std::span<const Claim> claims) {
  const std::lock_guard lock(mutex_);
  std::int64_t wanted = 0;
  for (const Claim& claim : claims)
    wanted += std::max<std::int64_t>(0, claim.length - held_[static_cast<std::size_t>(claim.slot)]);
  if (wanted > positions_ - used_) refuse(wanted);
  used_ += wanted;
  for (const Claim& claim : claims) {
    std::int64_t& held = held_[static_cast<std::size_t>(claim.slot)];
    held = std::max(held, claim.length);
  }
}

void KvPool::give_back(std::int32_t slot, std::int64_t length) {
  const std::lock_guard lock(mutex_);
  std::int64_t& held = held_[static_cast<std::size_t>(slot)];
  used_ -= std::max<std::int64_t>(0, held - length);
  held = std::min(held, length);
}

std::int64_t KvPool::held(std::int32_t slot) const {
  const std::lock_guard lock(mutex_);
  return held_[static_cast<std::size_t>(slot)];
}

void KvPool::refuse(std::int64_t wanted) const {
  const auto sequences = std::ranges::count_if(held_, [](std::int64_t held) { return held > 0; });
  throw Error(
      HETCOMP_POOL_FULL,
      "The KV cache is full: " + std::to_string(used_) + " of its " + std::to_string(positions_) +
          " positions are held by " + std::to_string(sequences) +
          (sequences == 1 ? " sequence" : " sequences") + ", and " + std::to_string(wanted) +
          " more are needed: free, reset or truncate a session, or compile with a larger --kv-tokens.");
}

}  // namespace hetcomp
