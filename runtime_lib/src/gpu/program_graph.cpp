#include "program_graph.h"

#include <algorithm>

#include "event_places.h"

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

CUdeviceptr flag_of(const HandShake& hand_shake, const HandOver& hand_over) {
  return hand_over.raises && hand_over.with_cpu() ? hand_shake.to_cpu_address(hand_over.flag)
                                                  : hand_shake.to_gpu_address(hand_over.flag);
}

CUstreamBatchMemOpParams operation(const HandShake& hand_shake, const HandOver& hand_over) {
  const CUdeviceptr flag = flag_of(hand_shake, hand_over);
  return hand_over.raises ? raise_flag(flag) : await_flag(flag);
}

}  // namespace

// Where no two nodes run side by side, they share what the largest needs.
void ProgramGraph::take_scratch(DeviceBudget& budget) {
  std::uint64_t shared = 0;
  if (is_line(record_)) {
    for (const NodeRecord& node : record_.nodes)
      if (const auto* kernel = std::get_if<KernelNode>(&node.work))
        shared = std::max(shared, scratch_bytes(parts_, *kernel));
  }
  for (const std::size_t i : record_.order) {
    const auto* node = std::get_if<KernelNode>(&record_.nodes[i].work);
    const std::uint64_t bytes = node == nullptr ? 0 : scratch_bytes(parts_, *node);
    if (bytes == 0) continue;
    if (shared == 0 || scratch_.empty())
      scratch_.emplace_back(parts_.driver, budget, parts_.stream, std::max(bytes, shared),
                            "the scratch memory of " + node->kernel);
    scratch_of_[i] = scratch_.back().address();
  }
}

KernelLaunch ProgramGraph::launch_of(std::size_t index) const {
  const auto& node = std::get<KernelNode>(record_.nodes[index].work);
  KernelLaunch launch(parts_.kernels[node.kernel], node.grid);
  struct Add {
    KernelLaunch& launch;
    const GraphParts& parts;
    void operator()(const BufferAddress& place) const { launch.add_pointer(parts.buffers.address(place)); }
    void operator()(const HandOver& flag) const { launch.add_pointer(flag_of(parts.hand_shake, flag)); }
    void operator()(std::int32_t value) const { launch.add_int32(value); }
    void operator()(std::int64_t value) const { launch.add_int64(value); }
    void operator()(float value) const { launch.add_float32(value); }
  };
  for (const ArgumentValue& value : node.arguments) std::visit(Add{launch, parts_}, value);
  // Triton's entries take two pointers more: scratch memory, and memory of its profiler, which is not
  // compiled in.
  const auto scratch = scratch_of_.find(index);
  launch.add_pointer(scratch != scratch_of_.end() ? scratch->second : 0);
  launch.add_pointer(0);
  return launch;
}

CUgraphNode ProgramGraph::add(Graph& graph, const Step& step, const std::vector<CUgraphNode>& after) const {
  if (std::holds_alternative<KernelNode>(record_.nodes[step.node].work)) {
    KernelLaunch launch = launch_of(step.node);
    return graph.add_kernel(launch, after);
  }
  std::vector operations{operation(parts_.hand_shake, std::get<HandOver>(record_.nodes[step.node].work))};
  if (step.second)
    operations.push_back(operation(parts_.hand_shake, std::get<HandOver>(record_.nodes[*step.second].work)));
  return graph.add_memory_operations(parts_.context.get(), operations, after);
}

// events: none, or as events_.
GraphExecHandle ProgramGraph::build(const std::vector<EventHandle>& events) const {
  Graph graph(parts_.driver);
  std::vector<CUgraphNode> nodes(record_.nodes.size());
  const CUgraphNode begin = events.empty() ? nullptr : graph.add_event(events[0].get(), {});
  std::size_t recorded = 0;
  for (std::size_t i = 0; i < steps_.size(); ++i) {
    const auto& [node, second] = steps_[i];
    std::vector<CUgraphNode> after;
    for (const std::size_t before : record_.nodes[node].after) after.push_back(nodes[before]);
    if (begin != nullptr && after.empty()) after.push_back(begin);
    std::ranges::sort(after);
    after.erase(std::ranges::unique(after).begin(), after.end());
    nodes[node] = add(graph, steps_[i], after);
    if (begin != nullptr && places_[recorded] == i)
      nodes[node] = graph.add_event(events[++recorded].get(), {nodes[node]});
    if (second) nodes[*second] = nodes[node];
  }
  return graph.instantiate();
}

ProgramGraph::ProgramGraph(const GraphParts& parts, const GraphRecord& record, DeviceBudget& budget)
    : parts_(parts), record_(record) {
  const std::map<std::size_t, std::size_t> paired = pairs(record);
  std::vector<bool> seconds(record.nodes.size());
  for (const auto& [first, second] : paired) seconds[second] = true;
  std::vector<bool> hand_overs;
  for (const std::size_t i : record.order) {
    if (seconds[i]) continue;
    const auto pair = paired.find(i);
    steps_.push_back({i, pair == paired.end() ? std::nullopt : std::optional(pair->second)});
    hand_overs.push_back(!record.nodes[i].hand_overs().empty());
  }
  places_ = event_places(hand_overs);
  take_scratch(budget);
  exec_ = build({});
}

CUgraphExec ProgramGraph::timed() {
  if (events_.empty()) {
    std::vector<EventHandle> events;
    for (std::size_t i = 0; i <= places_.size(); ++i) events.push_back(create_event(parts_.driver));
    timed_ = build(events);
    events_ = std::move(events);
  }
  return timed_.get();
}

// Of the steps from the first to the last; without times.
GpuEvent ProgramGraph::run_of(std::size_t first, std::size_t last) const {
  GpuEvent run{.kind = GpuEvent::Kind::kHandOver, .launches = static_cast<std::int32_t>(last - first + 1)};
  for (std::size_t i = first; i <= last && run.kernel == nullptr; ++i)
    run.kernel = std::get_if<KernelNode>(&record_.nodes[steps_[i].node].work);
  const bool hands_over = first == last && !record_.nodes[steps_[first].node].hand_overs().empty();
  if (run.kernel != nullptr && !hands_over) run.kind = GpuEvent::Kind::kKernel;
  return run;
}

// Where nodes run side by side, which the compiler's do not, a run ends with its last node.
void ProgramGraph::read_times(const EventClock& clock, std::vector<GpuEvent>& events) const {
  if (events_.empty()) return;
  std::optional<std::int64_t> begin = clock.nanoseconds(events_[0].get());
  std::size_t first = 0;
  for (std::size_t i = 0; i < places_.size(); ++i) {
    const std::optional<std::int64_t> end = clock.nanoseconds(events_[i + 1].get());
    if (!begin || !end) return;  // the graph did not come to its end
    GpuEvent& run = events.emplace_back(run_of(first, places_[i]));
    run.begin_ns = std::min(*begin, *end);
    run.end_ns = *end;
    begin = std::max(begin, end);
    first = places_[i] + 1;
  }
}

}  // namespace hetcomp::gpu
