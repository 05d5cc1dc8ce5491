// What each thread of the lanes does in a step, noted by the program.
#pragma once

#include <cstdint>
#include <vector>

#include "hetcomp/hetcomp.h"
#include "hetcomp/program.h"

namespace hetcomp {

class LaneTrace {
 public:
  // Of a thread. A step of DeepSeek-V3 has some 4,000.
  static constexpr std::int64_t kEvents = 1 << 14;

  // Takes memory for so many threads; 0: gives it back.
  void resize(int threads);
  // For hetcomp_step::trace; null if there are no threads.
  hetcomp_lane_trace* begin();
  // The events of the step, thread by thread.
  const std::vector<hetcomp_lane_event>& collect();
  // Of the step: for how many there was no room.
  std::int64_t dropped() const;

 private:
  std::vector<std::vector<hetcomp_trace_event>> memory_;
  std::vector<hetcomp_lane_trace> lanes_;
  std::vector<hetcomp_lane_event> events_;
};

}  // namespace hetcomp
