#include "program_graph.h"

#include <algorithm>
#include <map>

namespace hetcomp::gpu {
namespace {

// Beyond any device, and far from overflow.
constexpr std::uint64_t kMostScratch = 1ULL << 46;

// Where nothing stands between raising a flag and awaiting one, one node does both: a node of a graph costs
// more than an operation in it. Key: the node that raises; value: the one that awaits.
std::map<std::size_t, std::size_t> pairs(const GraphRecord& graph) {
  std::vector<int> followers(graph.nodes.size());
  for (const NodeRecord& node : graph.nodes)
    for (const std::size_t before : node.after) ++followers[before];
  std::map<std::size_t, std::size_t> result;
  for (std::size_t i = 0; i < graph.nodes.size(); ++i) {
    const auto* await = std::get_if<HandOver>(&graph.nodes[i].work);
    if (await == nullptr || await->raises || graph.nodes[i].after.size() != 1) continue;
    const std::size_t before = graph.nodes[i].after.front();
    const auto* ask = std::get_if<HandOver>(&graph.nodes[before].work);
    if (ask != nullptr && ask->raises && followers[before] == 1) result[before] = i;
  }
  return result;
}

// Whether every node awaits the one before it.
bool is_line(const GraphRecord& graph) {
  for (std::size_t i = 1; i < graph.order.size(); ++i) {
    const std::vector<std::size_t>& after = graph.nodes[graph.order[i]].after;
    if (std::ranges::find(after, graph.order[i - 1]) == after.end()) return false;
  }
  return true;
}

std::uint64_t scratch_bytes(const GraphParts& parts, const KernelNode& node) {
  const double blocks = static_cast<double>(node.grid[0]) * node.grid[1] * node.grid[2];
  const double bytes = blocks * static_cast<double>(parts.kernels[node.kernel].record.global_scratch_bytes);
  return bytes < static_cast<double>(kMostScratch) ? static_cast<std::uint64_t>(bytes) : kMostScratch;
}

CUstreamBatchMemOpParams operation(const HandShake& hand_shake, const HandOver& hand_over) {
  if (!hand_over.raises) return await_flag(hand_shake.to_gpu_address(hand_over.flag));
  return raise_flag(hand_over.with_cpu() ? hand_shake.to_cpu_address(hand_over.flag)
                                         : hand_shake.to_gpu_address(hand_over.flag));
}

}  // namespace

KernelLaunch ProgramGraph::launch_of(const GraphParts& parts, const KernelNode& node, DeviceBudget& budget) {
  const LoadedKernel& kernel = parts.kernels[node.kernel];
  KernelLaunch launch(kernel, node.grid);
  struct Add {
    KernelLaunch& launch;
    const ProgramBuffers& buffers;
    void operator()(const BufferAddress& place) const { launch.add_pointer(buffers.address(place)); }
    void operator()(std::int32_t value) const { launch.add_int32(value); }
    void operator()(std::int64_t value) const { launch.add_int64(value); }
    void operator()(float value) const { launch.add_float32(value); }
  };
  for (const ArgumentValue& value : node.arguments) std::visit(Add{launch, parts.buffers}, value);
  const std::uint64_t bytes = scratch_bytes(parts, node);
  if (bytes > 0 && !(shared_scratch_ && !scratch_.empty())) {
    const std::uint64_t size = std::max(bytes, shared_scratch_);
    scratch_.emplace_back(parts.driver, budget, parts.stream, size, "the scratch memory of " + node.kernel);
  }
  const CUdeviceptr scratch = bytes > 0 ? scratch_.back().address() : 0;
  // Triton's entries take two pointers more: scratch memory, and memory of its profiler, which is not
  // compiled in.
  launch.add_pointer(scratch);
  launch.add_pointer(0);
  return launch;
}

ProgramGraph::ProgramGraph(const GraphParts& parts, const GraphRecord& record, DeviceBudget& budget) {
  Graph graph(parts.driver);
  if (is_line(record)) {
    for (const NodeRecord& node : record.nodes)
      if (const auto* kernel = std::get_if<KernelNode>(&node.work))
        shared_scratch_ = std::max(shared_scratch_, scratch_bytes(parts, *kernel));
  }
  const std::map<std::size_t, std::size_t> paired = pairs(record);
  std::vector<CUgraphNode> nodes(record.nodes.size());
  for (const std::size_t i : record.order) {
    if (nodes[i] != nullptr) continue;  // the second of a pair
    std::vector<CUgraphNode> after;
    for (const std::size_t before : record.nodes[i].after) after.push_back(nodes[before]);
    std::ranges::sort(after);
    after.erase(std::ranges::unique(after).begin(), after.end());
    if (const auto* kernel = std::get_if<KernelNode>(&record.nodes[i].work)) {
      KernelLaunch launch = launch_of(parts, *kernel, budget);
      nodes[i] = graph.add_kernel(launch, after);
      continue;
    }
    std::vector operations{operation(parts.hand_shake, std::get<HandOver>(record.nodes[i].work))};
    const auto pair = paired.find(i);
    if (pair != paired.end())
      operations.push_back(operation(parts.hand_shake, std::get<HandOver>(record.nodes[pair->second].work)));
    nodes[i] = graph.add_memory_operations(parts.context.get(), operations, after);
    if (pair != paired.end()) nodes[pair->second] = nodes[i];
  }
  exec_ = graph.instantiate();
}

}  // namespace hetcomp::gpu
