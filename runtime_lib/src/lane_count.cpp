#include "lane_count.h"

#include <algorithm>

namespace hetcomp {

LaneCount::LaneCount(int lanes) : lanes_(lanes), active_(lanes) {
  // One and two busy processes, and something heavier such as another computation on all cores.
  for (const int fewer : {lanes - 1, lanes - 2, lanes / 2})
    if (fewer >= 1 && std::find(fewer_.begin(), fewer_.end(), fewer) == fewer_.end()) fewer_.push_back(fewer);
}

void LaneCount::add(std::int64_t tokens, std::int64_t preemptions, std::chrono::nanoseconds time) {
  if (tokens != window_.tokens) window_ = {.tokens = tokens};
  window_.steps += 1;
  window_.preemptions += preemptions;
  window_.time += time;
  if (window_.time < kWindow || window_.steps < kWindowSteps) return;
  const bool was_contended = contended_;
  contended_ = window_.preemptions * std::chrono::seconds(1) >= kContendedPerSecond * window_.time;
  decide(was_contended);
  window_ = {.tokens = tokens};
}

void LaneCount::decide(bool was_contended) {
  switch (mode_) {
    case Mode::kWatch:
      watch(was_contended);
      break;
    case Mode::kSettle:
      mode_ = Mode::kMeasure;
      break;
    case Mode::kMeasure:
      judge();
      break;
    case Mode::kHold:
      hold();
      break;
  }
}

void LaneCount::watch(bool was_contended) {
  if (!contended_) {
    hold_ = kShortestHold;
    return;
  }
  // Two windows in a row: the second is without long spinning, the best that all lanes can do.
  if (!was_contended || fewer_.empty()) return;
  best_ = active_;
  best_window_ = window_;
  next_ = 0;
  try_next();
}

void LaneCount::try_next() {
  if (next_ < fewer_.size()) {
    active_ = fewer_[next_++];
    contended_ = false;
    mode_ = Mode::kSettle;
  } else {
    active_ = best_;
    held_ = Time{0};
    mode_ = Mode::kHold;
  }
}

void LaneCount::judge() {
  if (window_.tokens != best_window_.tokens) {  // nothing to compare with: a prompt came in between
    active_ = lanes_;
    mode_ = Mode::kWatch;
    return;
  }
  if (window_.step() < best_window_.step()) {
    best_ = active_;
    best_window_ = window_;
  }
  try_next();
}

void LaneCount::hold() {
  held_ += window_.time;
  if (held_ < hold_) return;
  active_ = lanes_;
  mode_ = Mode::kWatch;
  hold_ = std::min(hold_ * 2, kLongestHold);
}

}  // namespace hetcomp
