#include "node_map.h"

#include <algorithm>
#include <numeric>
#include <set>

namespace hetcomp {
namespace {

// Index of a machine node for every node of the artifact.
std::vector<std::size_t> assign(const std::vector<int>& plan_nodes, const std::vector<MachineNode>& machine) {
  std::vector<std::size_t> chosen;
  for (const int id : plan_nodes)
    for (std::size_t m = 0; m < machine.size(); ++m)
      if (machine[m].id == id) chosen.push_back(m);
  if (chosen.size() == plan_nodes.size()) return chosen;
  chosen.clear();
  const std::size_t targets = std::min(machine.size(), plan_nodes.size());
  for (std::size_t i = 0; i < plan_nodes.size(); ++i) chosen.push_back(i * targets / plan_nodes.size());
  return chosen;
}

// `n` pieces in proportion to the weights (d'Hondt), at most `limits`, one for each before the second for
// any.
std::vector<int> apportion(int n, const std::vector<double>& weights, const std::vector<int>& limits) {
  std::vector<int> given(weights.size());
  for (int piece = 0; piece < n; ++piece) {
    std::size_t best = given.size();
    const auto claim = [&](std::size_t i) { return given[i] == 0 ? 1e300 : weights[i] / (given[i] + 1); };
    for (std::size_t i = 0; i < given.size(); ++i)
      if (given[i] < limits[i] && (best == given.size() || claim(i) > claim(best))) best = i;
    if (best == given.size()) break;
    ++given[best];
  }
  return given;
}

}  // namespace

std::vector<NodePlace> place_nodes(const std::vector<int>& plan_nodes,
                                   const std::vector<std::uint64_t>& bytes, const CpuBudget& budget,
                                   const std::vector<MachineNode>& machine) {
  const int threads = static_cast<int>(budget.cpus.size());
  if (plan_nodes.size() == 1) return {{plan_nodes[0], kNoNode, threads, budget.cpus}};

  const std::vector<std::size_t> chosen = assign(plan_nodes, machine);
  const std::set<int> cores(budget.order.begin(), budget.order.begin() + budget.cores);
  std::vector<double> weights(machine.size());
  std::vector<int> limits(machine.size());
  for (const std::size_t m : chosen) {
    const auto is_core = [&](int cpu) { return cores.contains(cpu); };
    weights[m] = static_cast<double>(std::ranges::count_if(machine[m].cpus, is_core));
    limits[m] = static_cast<int>(machine[m].cpus.size());
  }
  const std::vector<int> per_machine = apportion(threads, weights, limits);

  std::vector<NodePlace> places(plan_nodes.size());
  for (std::size_t m = 0; m < machine.size(); ++m) {
    std::vector<std::size_t> here;
    std::vector<double> shares;
    for (std::size_t i = 0; i < chosen.size(); ++i) {
      if (chosen[i] != m) continue;
      here.push_back(i);
      shares.push_back(static_cast<double>(bytes[i]));
    }
    const std::vector<int> split =
        apportion(per_machine[m], shares, std::vector<int>(here.size(), per_machine[m]));
    std::vector<int> cpus;  // in the budget's order: other cores before other hyperthreads
    for (const int cpu : budget.order)
      if (std::ranges::find(machine[m].cpus, cpu) != machine[m].cpus.end()) cpus.push_back(cpu);
    cpus.resize(std::min(cpus.size(), static_cast<std::size_t>(std::max(per_machine[m], 1))));
    for (std::size_t k = 0; k < here.size(); ++k)
      places[here[k]] = {plan_nodes[here[k]], machine[m].id, split[k], cpus};
  }
  return places;
}

std::string shared_nodes_note(const std::vector<NodePlace>& places) {
  std::set<int> used;
  for (const NodePlace& place : places) used.insert(place.machine_node);
  if (used.size() == places.size()) return "";
  return "The artifact was compiled for " + std::to_string(places.size()) +
         " NUMA nodes, this machine offers " + std::to_string(used.size()) +
         ": threads are divided and several nodes' weights share a memory; compile it " +
         "here to be faster.";
}

}  // namespace hetcomp
