#include "lane_trace.h"

#include <algorithm>

namespace hetcomp {

void LaneTrace::resize(int threads) {
  lanes_.clear();
  events_.clear();
  memory_.resize(static_cast<std::size_t>(threads));
  for (std::vector<hetcomp_trace_event>& events : memory_) {
    events.resize(kEvents);
    lanes_.push_back({events.data(), kEvents, 0});
  }
}

hetcomp_lane_trace* LaneTrace::begin() {
  for (hetcomp_lane_trace& lane : lanes_) lane.n = 0;
  return lanes_.empty() ? nullptr : lanes_.data();
}

const std::vector<hetcomp_lane_event>& LaneTrace::collect() {
  events_.clear();
  for (std::size_t thread = 0; thread < lanes_.size(); ++thread) {
    const auto n = static_cast<std::size_t>(std::min(lanes_[thread].n, lanes_[thread].capacity));
    for (std::size_t i = 0; i < n; ++i) {
      const hetcomp_trace_event& event = memory_[thread][i];
      events_.push_back({event.ns, static_cast<std::int32_t>(thread), event.call, event.what, 0});
    }
  }
  return events_;
}

std::int64_t LaneTrace::dropped() const {
  std::int64_t sum = 0;
  for (const hetcomp_lane_trace& lane : lanes_) sum += std::max<std::int64_t>(0, lane.n - lane.capacity);
  return sum;
}

}  // namespace hetcomp
