#include "adapter_slots.h"

#include <algorithm>
#include <utility>

namespace hetcomp::gpu {

AdapterSlots::AdapterSlots(std::int32_t slots, std::vector<std::uint64_t> bytes)
    : state_(std::make_shared<State>()) {
  state_->used.resize(static_cast<std::size_t>(slots));
  state_->parts.resize(bytes.size());
  state_->bytes = std::move(bytes);
}

std::int32_t AdapterSlots::slots() const { return static_cast<std::int32_t>(state_->used.size()); }

bool AdapterSlots::possible(const std::vector<std::uint64_t>& bytes) const {
  for (std::size_t gpu = 0; gpu < bytes.size(); ++gpu)
    if (bytes[gpu] > state_->bytes[gpu]) return false;
  return true;
}

// The first gap that is large enough.
std::optional<std::uint64_t> AdapterSlots::State::find(std::size_t gpu, std::uint64_t wanted) const {
  std::uint64_t at = 0;
  for (const auto& [begin, end] : parts[gpu]) {
    if (begin - at >= wanted) return at;
    at = end;
  }
  if (bytes[gpu] - at >= wanted) return at;
  return std::nullopt;
}

std::shared_ptr<const AdapterPlace> AdapterSlots::take(const std::vector<std::uint64_t>& bytes) {
  const std::lock_guard lock(state_->mutex);
  const auto slot = std::ranges::find(state_->used, false);
  if (slot == state_->used.end()) return nullptr;
  auto place = std::make_unique<AdapterPlace>(
      AdapterPlace{static_cast<std::int32_t>(slot - state_->used.begin()), {}});
  for (std::size_t gpu = 0; gpu < bytes.size(); ++gpu) {
    const auto begin = state_->find(gpu, bytes[gpu]);
    if (!begin) return nullptr;
    place->begin.push_back(*begin);
  }
  const auto give_back = [state = state_, bytes](const AdapterPlace* gone) {
    {
      const std::lock_guard last(state->mutex);
      state->used[static_cast<std::size_t>(gone->slot)] = false;
      for (std::size_t gpu = 0; gpu < bytes.size(); ++gpu)
        if (bytes[gpu] > 0) state->parts[gpu].erase(gone->begin[gpu]);
    }
    delete gone;
  };
  std::shared_ptr<const AdapterPlace> taken(place.get(), give_back);
  const AdapterPlace* const owned = place.release();
  state_->used[static_cast<std::size_t>(owned->slot)] = true;
  for (std::size_t gpu = 0; gpu < bytes.size(); ++gpu)
    if (bytes[gpu] > 0) state_->parts[gpu].emplace(owned->begin[gpu], owned->begin[gpu] + bytes[gpu]);
  return taken;
}

}  // namespace hetcomp::gpu
