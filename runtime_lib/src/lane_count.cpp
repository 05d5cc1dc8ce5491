#include "lane_count.h"

#include <algorithm>

namespace hetcomp {

LaneCount::LaneCount(int lanes) : lanes_(lanes), active_(lanes) {
  // One and two busy processes, and something heavier such as another computation on all cores.
  for (const int fewer : {lanes - 1, lanes - 2, lanes / 2})
    if (fewer >= 1 && std::ranges::find(others_, fewer) == others_.end()) others_.push_back(fewer);
  // All once more: the process may be gone by then, and the others were compared with a disturbed window.
  if (!others_.empty()) others_.push_back(lanes);
}

bool LaneCount::add(std::int64_t tokens, std::chrono::nanoseconds time) {
  if (tokens != window_.tokens) window_ = {.tokens = tokens};
  window_.steps += 1;
  window_.time += time;
  return window_.time >= kWindow && window_.steps >= kWindowSteps;
}

void LaneCount::decide(double waited) {
  const bool was_contended = contended_;
  contended_ = waited >= kContended;
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
  window_ = {.tokens = window_.tokens};
}

void LaneCount::watch(bool was_contended) {
  if (!contended_) {
    hold_ = kShortestHold;
    return;
  }
  // Two windows in a row: the second is without long spinning, the best that all lanes can do.
  if (!was_contended || others_.empty()) return;
  best_ = active_;
  best_window_ = window_;
  next_ = 0;
  try_next();
}

void LaneCount::try_next() {
  if (next_ < others_.size()) {
    active_ = others_[next_++];
    contended_ = active_ == lanes_;  // fewer have their CPUs for themselves
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
  contended_ |= active_ != lanes_;  // until a window of all lanes shows that they are alone
  active_ = lanes_;
  mode_ = Mode::kWatch;
  hold_ = std::min(hold_ * 2, kLongestHold);
}

}  // namespace hetcomp
