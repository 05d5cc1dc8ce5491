#include "graph_order.h"

#include <algorithm>
#include <map>
#include <set>

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
  std::set<std::uint32_t> awaited;
  std::vector<std::pair<std::uint32_t, std::size_t>> answers;
  for (std::size_t i = 0; i < graph.nodes.size(); ++i) {
    const bool kernel = std::holds_alternative<KernelNode>(graph.nodes[i].work);
    for (const HandOver* hand_over : graph.nodes[i].hand_overs()) {
      const auto [flag, raises, other] = *hand_over;
      const bool answer = !raises && hand_over->with_cpu();
      if (answer) answers.emplace_back(flag, i);
      // Kernels may look at an answer as often as they like. Between GPUs a flag has one direction.
      const bool first = !answer ? asked.emplace(flag, i).second : kernel || awaited.insert(flag).second;
      if (!first) return WrongHandOver{i, "the only one of its flag and direction"};
    }
  }
  for (const auto& [flag, node] : answers) {
    if (flag >= flags) continue;
    const auto before = asked.find(flag);
    // A kernel may await the answer to another GPU.
    if (before == asked.end() ? std::holds_alternative<HandOver>(graph.nodes[node].work)
                              : !comes_after(graph.nodes, node, before->second))
      return WrongHandOver{node, "after the hand-over of the same flag to the CPU"};
  }
  return std::nullopt;
}

}  // namespace hetcomp::gpu
