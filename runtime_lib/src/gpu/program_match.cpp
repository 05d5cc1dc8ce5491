#include "program_match.h"

#include <map>
#include <set>
#include <utility>

#include "../status.h"

namespace hetcomp::gpu {
namespace {

[[noreturn]] void refuse(const std::string& what) {
  throw Error(HETCOMP_BAD_ARTIFACT,
              "The GPU programs do not fit each other: " + what + ": compile the model again.");
}

bool is_like(const GraphRecord& graph, const GraphRecord& other) {
  return graph.batch == other.batch && graph.adapted == other.adapted;
}

const GraphRecord& graph_like(const GraphRecord& wanted, const GpuProgramRecord& program) {
  for (const GraphRecord& graph : program.graphs)
    if (is_like(graph, wanted) && graph.exact == wanted.exact) return graph;
  refuse("the one for " + program.device + " has no graph for batch size " + std::to_string(wanted.batch));
}

void check_batch(const GraphRecord& like, std::span<const GpuProgramRecord* const> programs) {
  const std::string batch = " of batch size " + std::to_string(like.batch);
  std::map<std::uint32_t, std::set<std::pair<std::string, std::string>>> given, taken;  // flag: from, to
  std::set<std::uint32_t> answered;                                                     // by the CPU
  for (const GpuProgramRecord* program : programs) {
    for (const NodeRecord& node : graph_like(like, *program).nodes) {
      for (const HandOver* hand_over : node.hand_overs()) {
        if (hand_over->with_cpu() && !hand_over->raises) {
          if (hand_over->flag < program->flags) answered.insert(hand_over->flag);
          continue;
        }
        auto& made = hand_over->raises ? given : taken;
        const auto ends = hand_over->raises ? std::pair(program->device, hand_over->other)
                                            : std::pair(hand_over->other, program->device);
        if (!made[hand_over->flag].insert(ends).second || made[hand_over->flag].size() > 1)
          refuse("hand-over " + std::to_string(hand_over->flag) + batch + " is made twice");
      }
    }
  }
  for (const auto& [flag, ends] : taken)
    if (!given.contains(flag) || given[flag] != ends)
      refuse("hand-over " + std::to_string(flag) + batch + " is awaited by " + ends.begin()->second +
             ", but not made by " + ends.begin()->first);
  for (const std::uint32_t flag : answered)
    if (!given.contains(flag))
      refuse("hand-over " + std::to_string(flag) + batch + " is awaited from the CPU, which is not asked");
  for (const auto& [flag, ends] : given)
    if (ends.begin()->second != "cpu" && !taken.contains(flag))
      refuse("hand-over " + std::to_string(flag) + batch + " is not awaited by " + ends.begin()->second);
}

}  // namespace

void require_match(std::span<const GpuProgramRecord* const> programs) {
  const GpuProgramRecord& first = *programs.front();
  std::set<std::string> devices;
  for (const GpuProgramRecord* program : programs) {
    if (!devices.insert(program->device).second) refuse("two are for " + program->device);
    if (program->flags != first.flags)
      refuse(first.device + " has " + std::to_string(first.flags) + " hand-overs, " + program->device + " " +
             std::to_string(program->flags));
    if (program->graphs.size() != first.graphs.size())
      refuse("the one for " + program->device + " has " + std::to_string(program->graphs.size()) +
             " graphs, not " + std::to_string(first.graphs.size()));
  }
  for (const GraphRecord& graph : first.graphs) check_batch(graph, programs);
}

bool needs_cpu(const GpuProgramRecord& program) {
  for (const GraphRecord& graph : program.graphs)
    for (const NodeRecord& node : graph.nodes)
      for (const HandOver* hand_over : node.hand_overs())
        if (hand_over->with_cpu()) return true;
  return false;
}

std::size_t count_hand_overs(std::span<const GpuProgramRecord* const> programs, const GraphRecord& like) {
  std::set<std::uint32_t> made;
  for (const GpuProgramRecord* program : programs)
    for (const GraphRecord& graph : program->graphs)
      for (const NodeRecord& node : graph.nodes)
        for (const HandOver* hand_over : node.hand_overs())
          if (is_like(graph, like) && hand_over->raises && hand_over->flag < program->flags)
            made.insert(hand_over->flag);
  return made.size();
}

}  // namespace hetcomp::gpu
