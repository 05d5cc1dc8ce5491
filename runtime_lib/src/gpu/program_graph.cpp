#include "program_graph.h"

#include <algorithm>

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

CUstreamBatchMemOpParams operation(const HandShake& hand_shake, const HandOver& hand_over) {
  if (!hand_over.raises) return await_flag(hand_shake.to_gpu_address(hand_over.flag));
  return raise_flag(hand_over.with_cpu() ? hand_shake.to_cpu_address(hand_over.flag)
                                         : hand_shake.to_gpu_address(hand_over.flag));
}

}  // namespace

void ProgramGraph::take_scratch(DeviceBudget& budget) {
  for (std::size_t i = 0; i < record_.nodes.size(); ++i) {
    const auto* node = std::get_if<KernelNode>(&record_.nodes[i].work);
    const std::uint64_t block =
        node == nullptr ? 0 : parts_.kernels[node->kernel].record.global_scratch_bytes;
    if (block == 0) continue;
    const double blocks = static_cast<double>(node->grid[0]) * node->grid[1] * node->grid[2];
    const double bytes = blocks * static_cast<double>(block);
    const std::uint64_t size =
        bytes < static_cast<double>(kMostScratch) ? static_cast<std::uint64_t>(bytes) : kMostScratch;
    scratch_.try_emplace(i, parts_.driver, budget, parts_.stream, size,
                         "the scratch memory of " + node->kernel);
  }
}

KernelLaunch ProgramGraph::launch_of(std::size_t index) const {
  const auto& node = std::get<KernelNode>(record_.nodes[index].work);
  KernelLaunch launch(parts_.kernels[node.kernel], node.grid);
  struct Add {
    KernelLaunch& launch;
    const ProgramBuffers& buffers;
    void operator()(const BufferAddress& place) const { launch.add_pointer(buffers.address(place)); }
    void operator()(std::int32_t value) const { launch.add_int32(value); }
    void operator()(std::int64_t value) const { launch.add_int64(value); }
    void operator()(float value) const { launch.add_float32(value); }
  };
  for (const ArgumentValue& value : node.arguments) std::visit(Add{launch, parts_.buffers}, value);
  // Triton's entries take two pointers more: scratch memory, and memory of its profiler, which is not
  // compiled in.
  const auto scratch = scratch_.find(index);
  launch.add_pointer(scratch != scratch_.end() ? scratch->second.address() : 0);
  launch.add_pointer(0);
  return launch;
}

// One node for the node `index`, or for it and the `second` behind it.
CUgraphNode ProgramGraph::add(Graph& graph, std::size_t index, std::optional<std::size_t> second,
                              const std::vector<CUgraphNode>& after) const {
  if (std::holds_alternative<KernelNode>(record_.nodes[index].work)) {
    KernelLaunch launch = launch_of(index);
    return graph.add_kernel(launch, after);
  }
  std::vector operations{operation(parts_.hand_shake, std::get<HandOver>(record_.nodes[index].work))};
  if (second)
    operations.push_back(operation(parts_.hand_shake, std::get<HandOver>(record_.nodes[*second].work)));
  return graph.add_memory_operations(parts_.context.get(), operations, after);
}

// events: none, or one for the begin and one behind each node.
GraphExecHandle ProgramGraph::build(const std::vector<EventHandle>& events) const {
  Graph graph(parts_.driver);
  const std::map<std::size_t, std::size_t> paired = pairs(record_);
  std::vector<CUgraphNode> nodes(record_.nodes.size());
  const bool timed = !events.empty();
  const CUgraphNode begin = timed ? graph.add_event(events[0].get(), {}) : nullptr;
  for (const std::size_t i : record_.order) {
    if (nodes[i] != nullptr) continue;  // the second of a pair
    std::vector<CUgraphNode> after;
    for (const std::size_t before : record_.nodes[i].after) after.push_back(nodes[before]);
    if (timed && after.empty()) after.push_back(begin);
    std::ranges::sort(after);
    after.erase(std::ranges::unique(after).begin(), after.end());
    const auto pair = paired.find(i);
    const auto second = pair == paired.end() ? std::nullopt : std::optional(pair->second);
    nodes[i] = add(graph, i, second, after);
    if (timed) nodes[i] = graph.add_event(events[i + 1].get(), {nodes[i]});
    if (second) nodes[*second] = nodes[i];
  }
  return graph.instantiate();
}

ProgramGraph::ProgramGraph(const GraphParts& parts, const GraphRecord& record, DeviceBudget& budget)
    : parts_(parts), record_(record) {
  take_scratch(budget);
  exec_ = build({});
}

CUgraphExec ProgramGraph::timed() {
  if (events_.empty()) {
    std::vector<EventHandle> events;
    for (std::size_t i = 0; i <= record_.nodes.size(); ++i) events.push_back(create_event(parts_.driver));
    timed_ = build(events);
    events_ = std::move(events);
  }
  return timed_.get();
}

void ProgramGraph::read_times(const EventClock& clock, std::vector<GpuEvent>& events) const {
  if (events_.empty()) return;
  const std::optional<std::int64_t> start = clock.nanoseconds(events_[0].get());
  const std::map<std::size_t, std::size_t> paired = pairs(record_);
  std::vector<std::optional<std::int64_t>> ended(record_.nodes.size());
  std::vector<bool> seconds(record_.nodes.size());
  for (const auto& [first, second] : paired) seconds[second] = true;
  for (const std::size_t i : record_.order) {
    if (seconds[i]) {
      ended[i] = ended[record_.nodes[i].after.front()];
      continue;
    }
    ended[i] = clock.nanoseconds(events_[i + 1].get());
    std::optional<std::int64_t> begin = start;
    for (const std::size_t before : record_.nodes[i].after) begin = std::max(begin, ended[before]);
    if (!begin || !ended[i]) continue;
    const auto* kernel = std::get_if<KernelNode>(&record_.nodes[i].work);
    const auto kind = kernel != nullptr ? GpuEvent::Kind::kKernel : GpuEvent::Kind::kHandOver;
    events.push_back({kind, *begin, *ended[i], kernel, 0});
  }
}

}  // namespace hetcomp::gpu
