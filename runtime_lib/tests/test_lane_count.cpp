// The choice of lanes on simulated machines.
#include <gtest/gtest.h>

#include "lane_count.h"

namespace hetcomp {
namespace {

using std::chrono::microseconds;
using std::chrono::nanoseconds;

// A machine with `cores` cores of which `busy` are wanted by other processes. A step takes 8 ms of one core's
// time. Lanes beyond the free cores share: they wait for half of the time and hold up the others.
struct Machine {
  int cores;
  int busy;
  double slowdown = 3;  // of a step some lane of which shares its core

  nanoseconds run(LaneCount& count) {
    const int lanes = count.active();
    const bool shared = lanes + busy > cores;
    const double us = 8000.0 / lanes * (shared ? slowdown : 1);
    const auto time = microseconds(static_cast<long>(us));
    waited += shared ? time / 2 : nanoseconds{0};
    since += time;
    if (count.add(1, time)) {
      count.decide(std::chrono::duration<double>(waited) / since);
      waited = since = nanoseconds{0};
    }
    return time;
  }

  nanoseconds waited{0};
  nanoseconds since{0};
};

// Steps a second over five seconds of steps.
double speed(Machine& machine, LaneCount& count) {
  nanoseconds total{0};
  int steps = 0;
  for (; total < std::chrono::seconds(5); ++steps) total += machine.run(count);
  return steps / std::chrono::duration<double>(total).count();
}

TEST(LaneCount, AllLanesOnAQuietMachine) {
  Machine machine{8, 0};
  LaneCount count(8);
  for (int i = 0; i < 10000; ++i) {
    machine.run(count);
    ASSERT_EQ(count.active(), 8);
    ASSERT_FALSE(count.contended());
  }
}

TEST(LaneCount, LeavesTheCoresToOthersWhereThatIsFaster) {
  for (const int busy : {1, 2, 3}) {
    Machine machine{8, 0};
    LaneCount count(8);
    const double idle = speed(machine, count);
    machine.busy = busy;
    speed(machine, count);  // gets used to it
    EXPECT_GT(speed(machine, count), 0.75 * idle * (8 - busy) / 8) << busy;
    machine.busy = 0;
    speed(machine, count);
    speed(machine, count);
    EXPECT_EQ(count.active(), 8);
    EXPECT_GT(speed(machine, count), 0.99 * idle);
  }
}

TEST(LaneCount, KeepsALaneThatIsWorthMoreThanItCosts) {
  Machine machine{2, 1, 1.2};  // preempted often, but for moments only
  LaneCount count(2);
  speed(machine, count);
  EXPECT_GT(speed(machine, count), 0.95 * 250 / 1.2);
  EXPECT_TRUE(count.contended() || count.active() == 1);
}

TEST(LaneCount, OneLaneIsTheLeast) {
  Machine machine{1, 3};
  LaneCount count(2);
  speed(machine, count);
  for (int i = 0; i < 1000; ++i) {
    machine.run(count);
    ASSERT_GE(count.active(), 1);
  }
  LaneCount single(1);
  speed(machine, single);
  EXPECT_EQ(single.active(), 1);
}

// A process that was there for a moment: all lanes are tried once more before the fastest count is held.
TEST(LaneCount, ComesBackToAllLanesAtOnceWhenTheProcessIsGone) {
  Machine machine{2, 1};
  LaneCount count(2);
  while (count.active() == 2) machine.run(count);
  machine.busy = 0;
  nanoseconds since{0};
  while (!count.quiet()) since += machine.run(count);
  EXPECT_LT(since, std::chrono::milliseconds(400));
  for (int i = 0; i < 1000; ++i) {
    machine.run(count);
    ASSERT_TRUE(count.quiet());
  }
}

// Kernel threads take CPUs for moments, on many lanes more often: no reason to spin less.
TEST(LaneCount, ShortWaitsAreNoContention) {
  LaneCount count(16);
  for (int i = 0; i < 1000; ++i) {
    if (count.add(1, microseconds(10000))) count.decide(0.004);
    ASSERT_TRUE(count.quiet());
  }
}

TEST(LaneCount, PromptsBetweenDecodeStepsAreNotCompared) {
  LaneCount count(2);
  for (int i = 0; i < 1000; ++i) {
    if (count.add(1, microseconds(4000))) count.decide(0.5);
    if (count.add(512, microseconds(100000))) count.decide(0.5);
    ASSERT_GE(count.active(), 1);
    ASSERT_LE(count.active(), 2);
  }
}

}  // namespace
}  // namespace hetcomp
