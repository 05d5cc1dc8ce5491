// NUMA nodes of an artifact on made-up machines, and what is asked of the real one.
#include <gtest/gtest.h>
#include <unistd.h>

#include <cstring>
#include <numeric>

#include "memory.h"
#include "node_map.h"
#include "numa.h"

namespace hetcomp {
namespace {

// `cores` CPUs in use of `allowed`; the first `cores` are physical cores.
CpuBudget budget_of(int threads, int allowed, int cores) {
  CpuBudget budget{{}, std::vector<int>(static_cast<std::size_t>(allowed)), cores};
  std::iota(budget.order.begin(), budget.order.end(), 0);
  budget.cpus.assign(budget.order.begin(), budget.order.begin() + threads);
  return budget;
}

std::vector<int> threads_of(const std::vector<NodePlace>& places) {
  std::vector<int> threads;
  for (const NodePlace& place : places) threads.push_back(place.threads);
  return threads;
}

std::vector<int> machine_of(const std::vector<NodePlace>& places) {
  std::vector<int> nodes;
  for (const NodePlace& place : places) nodes.push_back(place.machine_node);
  return nodes;
}

TEST(NodeMap, OneNodeIsNotBound) {
  const auto places = place_nodes({3}, {100}, budget_of(2, 4, 4), {{0, {0, 1}}, {1, {2, 3}}});
  ASSERT_EQ(places.size(), 1U);
  EXPECT_EQ(places[0].machine_node, kNoNode);
  EXPECT_EQ(places[0].cpus, (std::vector<int>{0, 1}));
}

TEST(NodeMap, SameNodesHere) {
  // Node 1 has three cores, node 4 one.
  const std::vector<MachineNode> machine{{1, {0, 1, 2}}, {4, {3}}};
  const auto places = place_nodes({1, 4}, {100, 100}, budget_of(4, 4, 4), machine);
  EXPECT_EQ(machine_of(places), (std::vector<int>{1, 4}));
  EXPECT_EQ(threads_of(places), (std::vector<int>{3, 1}));
  EXPECT_EQ(places[0].cpus, (std::vector<int>{0, 1, 2}));
  EXPECT_EQ(places[1].cpus, (std::vector<int>{3}));
  EXPECT_EQ(shared_nodes_note(places), "");
}

TEST(NodeMap, FewThreadsStillReachEveryNode) {
  const std::vector<MachineNode> machine{{0, {0, 1, 2, 3, 4, 5}}, {1, {6, 7}}};
  EXPECT_EQ(threads_of(place_nodes({0, 1}, {9, 1}, budget_of(2, 8, 8), machine)), (std::vector<int>{1, 1}));
  EXPECT_EQ(threads_of(place_nodes({0, 1}, {9, 1}, budget_of(4, 8, 8), machine)), (std::vector<int>{3, 1}));
  EXPECT_EQ(threads_of(place_nodes({0, 1}, {9, 1}, budget_of(1, 8, 8), machine)), (std::vector<int>{1, 0}));
}

TEST(NodeMap, HyperthreadsComeLast) {
  // Cores 0, 1 | 2, 3 with siblings 4, 5 | 6, 7.
  const std::vector<MachineNode> machine{{0, {0, 1, 4, 5}}, {1, {2, 3, 6, 7}}};
  const auto places = place_nodes({0, 1}, {1, 1}, budget_of(4, 8, 4), machine);
  EXPECT_EQ(places[0].cpus, (std::vector<int>{0, 1}));
  EXPECT_EQ(places[1].cpus, (std::vector<int>{2, 3}));
}

TEST(NodeMap, OtherIdsAreTakenInOrder) {
  const auto places = place_nodes({0, 1}, {1, 1}, budget_of(2, 2, 2), {{4, {0}}, {7, {1}}});
  EXPECT_EQ(machine_of(places), (std::vector<int>{4, 7}));
}

TEST(NodeMap, FewerNodesThanTheArtifactHas) {
  const auto one = place_nodes({0, 1}, {300, 100}, budget_of(4, 4, 4), {{0, {0, 1, 2, 3}}});
  EXPECT_EQ(machine_of(one), (std::vector<int>{0, 0}));
  EXPECT_EQ(threads_of(one), (std::vector<int>{3, 1}));
  EXPECT_EQ(one[1].cpus.size(), 4U);
  EXPECT_NE(shared_nodes_note(one).find("compiled for 2 NUMA nodes, this machine offers 1"),
            std::string::npos);
  const auto two = place_nodes({0, 1, 2, 3}, {1, 1, 1, 1}, budget_of(4, 4, 4), {{0, {0, 1}}, {1, {2, 3}}});
  EXPECT_EQ(machine_of(two), (std::vector<int>{0, 0, 1, 1}));
  EXPECT_EQ(threads_of(two), (std::vector<int>{1, 1, 1, 1}));
  const auto none = place_nodes({0, 1}, {1, 1}, budget_of(2, 2, 2), {{kNoNode, {0, 1}}});
  EXPECT_EQ(machine_of(none), (std::vector<int>{kNoNode, kNoNode}));
}

TEST(Numa, CpuLists) {
  EXPECT_EQ(parse_cpu_list("0-2,5,8-9"), (std::vector<int>{0, 1, 2, 5, 8, 9}));
  EXPECT_TRUE(parse_cpu_list("").empty());
  EXPECT_TRUE(parse_cpu_list("3-1").empty());
  EXPECT_TRUE(parse_cpu_list("0-4000000000").empty());
  EXPECT_TRUE(parse_cpu_list("a").empty());
}

TEST(Numa, EveryAllowedCpuIsOnANode) {
  const CpuBudget budget = cpu_budget(0);
  std::size_t cpus = 0;
  for (const MachineNode& node : machine_nodes(budget.order)) cpus += node.cpus.size();
  EXPECT_EQ(cpus, budget.order.size());
}

TEST(Numa, PagesAreFoundOnceTheyAreTouched) {
  const auto page = static_cast<std::size_t>(sysconf(_SC_PAGESIZE));
  const Memory memory(8 * page, "a test");
  std::memset(memory.data(), 1, 3 * page);
  const PagePlaces places = page_places(memory.data(), 8 * page, kNoNode);
  EXPECT_EQ(places.pages, 8U);
  EXPECT_EQ(places.elsewhere, 0U);
  if (places.absent == 8) GTEST_SKIP() << "the kernel does not say where pages are";
  EXPECT_EQ(places.on_node, 3U);
  EXPECT_EQ(places.absent, 5U);
}

TEST(Numa, ANodeThatDoesNotExistIsRefused) {
  const Memory memory(4096, "a test", 1000);
  EXPECT_FALSE(memory.bound());
  std::memset(memory.data(), 1, 4096);  // usable all the same
  EXPECT_FALSE(bind_to_node(memory.data(), 4096, -3));
}

}  // namespace
}  // namespace hetcomp
