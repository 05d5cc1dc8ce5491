// Which node of this machine each NUMA node of an artifact becomes, and which threads work there.
#pragma once

#include <cstdint>
#include <string>
#include <vector>

#include "cpu_budget.h"
#include "numa.h"

namespace hetcomp {

struct NodePlace {
  int plan_node;     // the id in the artifact
  int machine_node;  // kNoNode: memory and threads are not bound
  int threads;
  std::vector<int> cpus;
};

// One entry for each of the artifact's nodes. Equal ids where this machine has them all, else in order,
// several on one machine node where it has fewer. Threads go to machine nodes by their cores and there to the
// artifact's nodes by `bytes`, the weights that each reads; every node gets one before any gets two. An
// artifact of one node is not bound: it runs as if there was no NUMA.
std::vector<NodePlace> place_nodes(const std::vector<int>& plan_nodes,
                                   const std::vector<std::uint64_t>& bytes, const CpuBudget& budget,
                                   const std::vector<MachineNode>& machine);

// What a user should know of it; empty if every node has one of its own.
std::string shared_nodes_note(const std::vector<NodePlace>& places);

}  // namespace hetcomp
