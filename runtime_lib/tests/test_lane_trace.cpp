#include <gtest/gtest.h>

#include "lane_trace.h"

namespace hetcomp {
namespace {

void note(hetcomp_lane_trace& lane, std::int64_t ns, std::int32_t what) {
  if (lane.n < lane.capacity) lane.events[lane.n] = {ns, 7, what};
  ++lane.n;
}

TEST(LaneTrace, EventsComeThreadByThreadAndStepsStartAnew) {
  LaneTrace trace;
  EXPECT_EQ(trace.begin(), nullptr);
  trace.resize(2);
  for (int step = 0; step < 2; ++step) {
    hetcomp_lane_trace* lanes = trace.begin();
    note(lanes[1], 5, 0);
    note(lanes[0], 6, HETCOMP_AT_BARRIER);
    note(lanes[1], 8, HETCOMP_AT_END);
    const auto& events = trace.collect();
    ASSERT_EQ(events.size(), 3U);
    EXPECT_EQ(events[0].thread, 0);
    EXPECT_EQ(events[0].ns, 6);
    EXPECT_EQ(events[0].timer, -1);
    EXPECT_EQ(events[0].call, 7);
    EXPECT_EQ(events[2].thread, 1);
    EXPECT_EQ(events[2].timer, -2);
    EXPECT_EQ(trace.dropped(), 0);
  }
  trace.resize(0);
  EXPECT_EQ(trace.begin(), nullptr);
  EXPECT_TRUE(trace.collect().empty());
}

TEST(LaneTrace, WhatHasNoRoomIsCounted) {
  LaneTrace trace;
  trace.resize(1);
  hetcomp_lane_trace* lane = trace.begin();
  for (std::int64_t i = 0; i < LaneTrace::kEvents + 3; ++i) note(*lane, i, 0);
  EXPECT_EQ(trace.collect().size(), static_cast<std::size_t>(LaneTrace::kEvents));
  EXPECT_EQ(trace.dropped(), 3);
}

}  // namespace
}  // namespace hetcomp
