// Lanes of several NUMA nodes: parts of a node are computed by its lanes, or by all where a node has none;
// meant to be run under ThreadSanitizer too.
#include <gtest/gtest.h>
#include <sched.h>

#include <algorithm>
#include <atomic>
#include <cstdint>
#include <numeric>
#include <vector>

#include "hetcomp/lane.h"
#include "lane_threads.h"

namespace hetcomp {
namespace {

constexpr int kNodes = 3;
constexpr std::int64_t kTasks = 37;
constexpr int kRegions = 90;  // more than a lane set has counters

int some_cpu() {
  const int cpu = sched_getcpu();
  return cpu < 0 ? 0 : cpu;
}

struct Work {
  std::vector<std::int64_t> parts[kNodes];
  std::vector<std::int64_t> sums;
  std::atomic<int> strangers{0};        // lanes that worked on a node which is not theirs alone
  std::atomic<int> together[kNodes]{};  // lanes of each node
};

// As a generated program does it: every node its part with barriers of its own, a barrier of all, the merge.
void cut_program(hetcomp_lane* lane, const hetcomp_step* step) {
  auto& work = *reinterpret_cast<Work*>(step->arena);
  if (lane->last_node - lane->first_node != 1) ++work.strangers;
  for (int node = lane->first_node; node < lane->last_node; ++node) ++work.together[node];
  for (int region = 0; region < kRegions; ++region) {
    for (int node = lane->first_node; node < lane->last_node; ++node) {
      auto& part = work.parts[node];
      parallel_for(*lane->own, kTasks, 2, [&](std::int64_t begin, std::int64_t end) {
        for (std::int64_t i = begin; i < end; ++i) part[static_cast<std::size_t>(i)] += node + 1;
      });
      if (region % 3 == 0) barrier(*lane->own);
      parallel_for(*lane->own, region % 5, 1, [](std::int64_t, std::int64_t) {});
    }
    barrier(*lane);
    parallel_for(*lane, kTasks, 3, [&](std::int64_t begin, std::int64_t end) {
      for (std::int64_t i = begin; i < end; ++i)
        for (auto& part : work.parts)
          work.sums[static_cast<std::size_t>(i)] += part[static_cast<std::size_t>(i)];
    });
    barrier(*lane);
  }
  barrier(*lane);
  barrier(*lane->own);
}

void run_cut_program(const std::vector<int>& threads, int steps) {
  std::vector<LaneGroup> groups;
  for (const int n : threads) groups.push_back({n, {some_cpu()}});
  LaneThreads lanes(groups);
  EXPECT_EQ(lanes.size(), std::accumulate(threads.begin(), threads.end(), 0));
  hetcomp_program program{};
  program.run = cut_program;
  for (int s = 0; s < steps; ++s) {
    Work work;
    for (auto& part : work.parts) part.resize(kTasks);
    work.sums.resize(kTasks);
    hetcomp_step step{};
    step.n_tokens = 1;
    step.arena = reinterpret_cast<std::uint8_t*>(&work);
    ASSERT_EQ(lanes.run(program, step), 0);
    for (std::int64_t i = 0; i < kTasks; ++i) {
      // Region r adds node + 1 to each part: after it they hold (r + 1) * (1 + 2 + 3) together.
      ASSERT_EQ(work.sums[static_cast<std::size_t>(i)], 6 * kRegions * (kRegions + 1) / 2);
    }
    const bool one_each = *std::min_element(threads.begin(), threads.end()) > 0;
    // LaneCount may have left lanes out, on a busy machine so many that a node had none.
    for (int node = 0; node < kNodes && one_each && work.strangers == 0; ++node) {
      EXPECT_GE(work.together[node], 1);
      EXPECT_LE(work.together[node], threads[static_cast<std::size_t>(node)]);
    }
    if (!one_each) {
      EXPECT_GT(work.strangers, 0);
    }
  }
}

TEST(NodeLanes, EveryNodeComputesItsPart) { run_cut_program({2, 1, 1}, 20); }

TEST(NodeLanes, FewerLanesThanNodes) {
  run_cut_program({1, 1, 0}, 20);
  run_cut_program({0, 1, 0}, 5);
}

void report_error_on_own(hetcomp_lane* lane, const hetcomp_step*) {
  if (lane->first_node == 1) lane->own->set->error.store(7);
  barrier(*lane);
}

TEST(NodeLanes, ErrorOfANodesKernelIsTheSteps) {
  LaneThreads lanes(std::vector<LaneGroup>{{1, {some_cpu()}}, {1, {some_cpu()}}});
  hetcomp_program program{};
  program.run = report_error_on_own;
  EXPECT_EQ(lanes.run(program, hetcomp_step{}), 7);
}

void record_cpus(hetcomp_lane* lane, const hetcomp_step* step) {
  cpu_set_t mask;
  sched_getaffinity(0, sizeof(mask), &mask);
  reinterpret_cast<int*>(step->arena)[lane->first_node] = CPU_COUNT(&mask) == 1 ? sched_getcpu() : -1;
  barrier(*lane);
}

// The caller is lane 0: bound to its node within a step, and where it was afterwards.
TEST(NodeLanes, LanesRunOnTheirNodesAndTheCallerIsFreeAgain) {
  cpu_set_t before;
  ASSERT_EQ(sched_getaffinity(0, sizeof(before), &before), 0);
  std::vector<int> allowed;
  for (int cpu = 0; cpu < CPU_SETSIZE; ++cpu)
    if (CPU_ISSET(cpu, &before)) allowed.push_back(cpu);
  if (allowed.size() < 2) GTEST_SKIP() << "one CPU";
  LaneThreads lanes(std::vector<LaneGroup>{{1, {allowed[1]}}, {1, {allowed[0]}}});
  hetcomp_program program{};
  program.run = record_cpus;
  int cpus[2] = {-1, -1};
  hetcomp_step step{};
  step.arena = reinterpret_cast<std::uint8_t*>(cpus);
  lanes.run(program, step);
  EXPECT_EQ(cpus[0], allowed[1]);
  EXPECT_EQ(cpus[1], allowed[0]);
  cpu_set_t after;
  ASSERT_EQ(sched_getaffinity(0, sizeof(after), &after), 0);
  EXPECT_TRUE(CPU_EQUAL(&before, &after));
}

}  // namespace
}  // namespace hetcomp
