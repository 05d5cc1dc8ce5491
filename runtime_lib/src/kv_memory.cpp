#include "kv_memory.h"

#include <algorithm>
#include <cstring>

namespace hetcomp {
namespace {

// Less is kept until others need it: short chats would fetch it again and again, page by page.
constexpr std::uint64_t kMuch = 64U << 20;

}  // namespace

KvMemory::KvMemory(const Manifest& manifest, int node)
    : records_(manifest.states),
      context_(static_cast<std::uint64_t>(manifest.model.context)),
      written_(static_cast<std::size_t>(manifest.model.max_batch)) {
  const auto slots = static_cast<std::uint64_t>(manifest.model.max_batch);
  // Where not all slots can be full, huge pages would take far more than the rows that are written.
  const bool pool = manifest.model.kv_tokens < manifest.model.context * manifest.model.max_batch;
  for (const StateRecord& state : records_) {
    const bool recurrent = manifest.model.recurrent && state.rows.empty();
    states_.emplace_back(state.bytes_per_slot * slots,
                         (recurrent ? "the state " : "the KV cache (") + state.name + (recurrent ? "" : ")"),
                         node, pool && !recurrent ? Pages::kSmall : Pages::kHuge);
    addresses_.push_back(states_.back().data());
    if (recurrent) {
      recurrent_.push_back(addresses_.size() - 1);
      recurrent_bytes_ += state.bytes_per_slot;
    }
    for (const std::uint64_t row : state.rows) position_bytes_ += row;
  }
}

bool KvMemory::bound() const { return std::ranges::all_of(states_, &Memory::bound); }

void KvMemory::write(std::span<const std::int32_t> slots, std::span<const std::int32_t> positions,
                     const KvPool& pool) {
  const std::lock_guard lock(mutex_);
  for (std::size_t t = 0; t < slots.size(); ++t) {
    std::int64_t& written = written_[static_cast<std::size_t>(slots[t])];
    const std::int64_t more = positions[t] + 1 - written;
    if (more <= 0) continue;
    written += more;
    all_written_ += more;
  }
  if (all_written_ <= pool.positions()) return;
  for (std::size_t slot = 0; slot < written_.size(); ++slot)
    release(slot, pool.held(static_cast<std::int32_t>(slot)));
}

void KvMemory::keep(std::int32_t slot, std::int64_t length) {
  const std::lock_guard lock(mutex_);
  const auto index = static_cast<std::size_t>(slot);
  const std::int64_t over = written_[index] - length;
  if (over > 0 && static_cast<std::uint64_t>(over) * position_bytes_ >= kMuch) release(index, length);
}

void KvMemory::save(std::int32_t slot, std::span<std::byte> to) const {
  for (const std::size_t i : recurrent_) {
    const std::uint64_t bytes = records_[i].bytes_per_slot;
    std::memcpy(to.data(), addresses_[i] + static_cast<std::uint64_t>(slot) * bytes, bytes);
    to = to.subspan(bytes);
  }
}

void KvMemory::restore(std::int32_t slot, std::span<const std::byte> from) {
  for (const std::size_t i : recurrent_) {
    const std::uint64_t bytes = records_[i].bytes_per_slot;
    std::memcpy(addresses_[i] + static_cast<std::uint64_t>(slot) * bytes, from.data(), bytes);
    from = from.subspan(bytes);
  }
}

void KvMemory::release(std::size_t slot, std::int64_t length) {
  const std::int64_t written = written_[slot];
  if (written <= length) return;
  for (std::size_t i = 0; i < states_.size(); ++i) {
    std::uint64_t at = slot * records_[i].bytes_per_slot;
    for (const std::uint64_t row : records_[i].rows) {
      states_[i].give_back(at + row * static_cast<std::uint64_t>(length),
                           at + row * static_cast<std::uint64_t>(written));
      at += row * context_;
    }
  }
  all_written_ -= written - length;
  written_[slot] = length;
}

}  // namespace hetcomp
