// The KV cache in the CPU's memory: pages come as rows are written, and go back when sequences are cut or
// end. And the states of recurrences, whose pages stay.
#pragma once

#include <cstddef>
#include <cstdint>
#include <mutex>
#include <span>
#include <vector>

#include "kv_pool.h"
#include "manifest.h"
#include "memory.h"

namespace hetcomp {

// Thread safe, as long as each slot has one user.
class KvMemory {
 public:
  KvMemory() = default;
  // node: see Memory. Throws Error.
  KvMemory(const Manifest& manifest, int node);

  // Of each state, in the order of the manifest's.
  std::uint8_t* const* addresses() const { return addresses_.data(); }
  bool bound() const;

  // Before a step writes these rows: never do more positions have memory than the pool has.
  void write(std::span<const std::int32_t> slots, std::span<const std::int32_t> positions,
             const KvPool& pool);
  // A sequence keeps its first `length` positions. Gives memory back if it is much: the next sequence has to
  // fetch it again, page by page.
  void keep(std::int32_t slot, std::int64_t length);

  // Of a sequence's recurrences.
  std::size_t recurrent_bytes() const { return recurrent_bytes_; }
  // Copies them; of a slot that no step is running for. to, from: [recurrent_bytes()].
  void save(std::int32_t slot, std::span<std::byte> to) const;
  void restore(std::int32_t slot, std::span<const std::byte> from);

 private:
  void release(std::size_t slot, std::int64_t length);

  std::vector<StateRecord> records_;
  std::vector<Memory> states_;
  std::vector<std::uint8_t*> addresses_;
  std::uint64_t position_bytes_ = 0;
  std::uint64_t context_ = 0;
  std::vector<std::size_t> recurrent_;  // indices of the recurrences' states
  std::size_t recurrent_bytes_ = 0;     // of a slot
  std::mutex mutex_;
  std::vector<std::int64_t> written_;  // positions by slot, that may have memory
  std::int64_t all_written_ = 0;
};

}  // namespace hetcomp
