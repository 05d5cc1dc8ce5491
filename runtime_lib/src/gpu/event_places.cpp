#include "event_places.h"

#include <algorithm>

namespace hetcomp::gpu {

std::vector<std::size_t> event_places(const std::vector<bool>& hand_overs) {
  constexpr std::size_t kMost = kMostEvents - 1;
  const std::size_t nodes = hand_overs.size();
  if (nodes == 0) return {};
  std::vector<bool> chosen(nodes);
  for (std::size_t i = 0; i < nodes; ++i)
    chosen[i] = hand_overs[i] || (i + 1 < nodes && hand_overs[i + 1]) || i + 1 == nodes;
  if (static_cast<std::size_t>(std::ranges::count(chosen, true)) > kMost) {
    chosen.assign(nodes, false);
    chosen.back() = true;
  }
  std::vector<std::size_t> places, others;
  for (std::size_t i = 0; i < nodes; ++i) (chosen[i] ? places : others).push_back(i);
  const std::size_t more = std::min(kMost - places.size(), others.size());
  for (std::size_t i = 0; i < more; ++i) places.push_back(others[(2 * i + 1) * others.size() / (2 * more)]);
  std::ranges::sort(places);
  return places;
}

}  // namespace hetcomp::gpu
