// What must hold of the order of a graph's nodes.
#pragma once

#include <cstddef>
#include <optional>
#include <string>
#include <vector>

#include "program_record.h"

namespace hetcomp::gpu {

// Every node behind those it comes after. Nodes of a cycle, and what comes after them, are missing.
std::vector<std::size_t> topological_order(const std::vector<NodeRecord>& nodes);

struct WrongHandOver {
  std::size_t node;
  std::string expected;
};

// A hand-over that is made twice, or an answer awaited from a CPU that was not asked before: the graph would
// hang.
std::optional<WrongHandOver> wrong_hand_over(const GraphRecord& graph, std::uint32_t flags);

}  // namespace hetcomp::gpu
