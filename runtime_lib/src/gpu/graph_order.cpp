#include "graph_order.h"

#include <algorithm>
#include <map>

namespace hetcomp::gpu {
namespace {

// Whether `node` comes after `wanted`, directly or through others.
bool comes_after(const std::vector<NodeRecord>& nodes, std::size_t node, std::size_t wanted) {
  std::vector<bool> seen(nodes.size());
  std::vector<std::size_t> open{node};
  while (!open.empty()) {
    const std::size_t at = open.back();
    open.pop_back();
    for (const std::size_t before : nodes[at].after) {
      if (before == wanted) return true;
      if (seen[before]) continue;
      seen[before] = true;
      open.push_back(before);
    }
  }
  return false;
}

}  // namespace

std::vector<std::size_t> topological_order(const std::vector<NodeRecord>& nodes) {
  std::vector<std::size_t> missing(nodes.size());
  std::vector<std::vector<std::size_t>> behind(nodes.size());
  std::vector<std::size_t> order;
  for (std::size_t i = 0; i < nodes.size(); ++i) {
    missing[i] = nodes[i].after.size();
    for (const std::size_t before : nodes[i].after) behind[before].push_back(i);
    if (missing[i] == 0) order.push_back(i);
  }
  for (std::size_t done = 0; done < order.size(); ++done)
    for (const std::size_t i : behind[order[done]])
      if (--missing[i] == 0) order.push_back(i);
  return order;
}

std::optional<WrongHandOver> wrong_hand_over(const GraphRecord& graph, std::uint32_t flags) {
  std::map<std::uint32_t, std::size_t> asked;
  std::map<std::uint32_t, std::size_t> awaited;
  for (std::size_t i = 0; i < graph.nodes.size(); ++i) {
    const auto* hand_over = std::get_if<HandOver>(&graph.nodes[i].work);
    if (hand_over == nullptr) continue;
    // Between GPUs a flag has one direction.
    auto& seen = hand_over->raises || !hand_over->with_cpu() ? asked : awaited;
    if (!seen.emplace(hand_over->flag, i).second)
      return WrongHandOver{i, "the only one of its flag and direction"};
  }
  for (const auto& [flag, node] : awaited) {
    if (flag >= flags) continue;
    const auto before = asked.find(flag);
    if (before == asked.end() || !comes_after(graph.nodes, node, before->second))
      return WrongHandOver{node, "after the hand-over of the same flag to the CPU"};
  }
  return std::nullopt;
}

}  // namespace hetcomp::gpu
