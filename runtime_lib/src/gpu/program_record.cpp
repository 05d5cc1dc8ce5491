#include "program_record.h"

#include <algorithm>
#include <charconv>
#include <map>
#include <utility>

#include "../checked_json.h"
#include "graph_order.h"

namespace hetcomp::gpu {
namespace {

constexpr std::uint64_t kMostFlags = 4096;
constexpr std::int32_t kMostSlots = 1 << 20;
constexpr std::size_t kMostNodes = 1U << 16;
constexpr std::int32_t kLargestBatch = 1 << 20;
// CUDA C++ Programming Guide, "Technical Specifications per Compute Capability".
constexpr std::uint64_t kMostBlocksX = 0x7fffffff;
constexpr std::uint64_t kMostBlocksYZ = 0xffff;

using BufferIndex = std::map<std::string, std::size_t>;

BufferKind buffer_kind(const CheckedJson& node) {
  static const std::map<std::string, BufferKind> kKinds{{"arena", BufferKind::kArena},
                                                        {"weight", BufferKind::kWeight},
                                                        {"constant", BufferKind::kConstant},
                                                        {"state", BufferKind::kState},
                                                        {"recurrent", BufferKind::kRecurrent},
                                                        {"result", BufferKind::kResult},
                                                        {"step", BufferKind::kStep},
                                                        {"pinned_in", BufferKind::kPinnedIn},
                                                        {"pinned_out", BufferKind::kPinnedOut},
                                                        {"stream", BufferKind::kStream},
                                                        {"pairs", BufferKind::kPairs}};
  const auto found = kKinds.find(node.text());
  if (found == kKinds.end())
    node.refuse(
        "arena, weight, constant, state, recurrent, result, step, pinned_in, pinned_out, stream or pairs");
  return found->second;
}

std::vector<BufferSource> buffer_sources(const CheckedJson& node, const BufferRecord& buffer,
                                         const std::vector<SourceRecord>& files) {
  std::vector<BufferSource> sources;
  std::uint64_t end = 0;
  for (const CheckedJson& entry : node.elements()) {
    BufferSource source{"", 0, entry["bytes"].number(1, buffer.bytes), entry["to"].number(end, buffer.bytes),
                        entry["xxh3_64"].hash_value()};
    if (entry.has("stored")) {
      source.stored = StoredWeight::parse(entry["stored"], source.bytes, files);
    } else {
      source.file = entry["file"].inner_path();
      source.offset = entry["offset"].number(0, GpuProgramRecord::kMostBytes);
    }
    if (source.bytes > buffer.bytes - source.to)
      entry.refuse("inside the buffer (" + std::to_string(buffer.bytes) + " bytes)");
    end = source.to + source.bytes;
    sources.push_back(std::move(source));
  }
  if (sources.empty()) node.refuse("a list of at least one piece of a file");
  return sources;
}

CacheRecord cache_record(const CheckedJson& node, std::uint64_t bytes) {
  constexpr std::uint64_t kMostGranules = 1U << 24;
  const CacheRecord cache{node["slots"].count(1, kMostSlots),
                          node["slot_bytes"].number(1, bytes),
                          node["block_bytes"].number(1, bytes),
                          node["block_positions"].number(1, bytes),
                          node["granule_bytes"].number(1, GpuProgramRecord::kMostBytes),
                          node["granules"].number(0, kMostGranules)};
  const std::uint64_t of_slots = static_cast<std::uint64_t>(cache.slots) * cache.slot_bytes;
  if (cache.slot_bytes % cache.block_bytes != 0) node["slot_bytes"].refuse("whole blocks");
  if (of_slots > bytes || cache.block_bytes > bytes - of_slots)
    node.refuse("slots and a block more within the buffer (" + std::to_string(bytes) + " bytes)");
  if (cache.granules > 0 && (cache.slot_bytes % cache.granule_bytes != 0 || bytes % cache.granule_bytes != 0))
    node["granule_bytes"].refuse("a part of slots and buffer");
  return cache;
}

RecurrentRecord recurrent_record(const CheckedJson& node, std::uint64_t bytes) {
  RecurrentRecord recurrent{node["slots"].count(1, kMostSlots), {}};
  const std::uint64_t places = static_cast<std::uint64_t>(recurrent.slots) + 1;
  std::uint64_t end = 0;
  for (const CheckedJson& entry : node["states"].elements()) {
    const RecurrentRecord::State state{entry["offset"].number(end, bytes - 1),
                                       entry["slot_bytes"].number(1, bytes)};
    if (state.slot_bytes > (bytes - state.offset) / places)
      entry.refuse("of all slots and one more within the buffer (" + std::to_string(bytes) + " bytes)");
    end = state.offset + places * state.slot_bytes;
    recurrent.states.push_back(state);
  }
  if (recurrent.states.empty()) node["states"].refuse("a list of at least one state");
  return recurrent;
}

BufferRecord buffer_record(const CheckedJson& node, const std::vector<SourceRecord>& files) {
  BufferRecord buffer{node["name"].text(),
                      node["bytes"].number(1, GpuProgramRecord::kMostBytes),
                      buffer_kind(node["kind"]),
                      {}};
  if (node.has("cache")) {
    if (buffer.kind != BufferKind::kState) node["cache"].refuse("absent: only a state has it");
    buffer.cache = cache_record(node["cache"], buffer.bytes);
  }
  if (buffer.kind == BufferKind::kRecurrent)
    buffer.recurrent = recurrent_record(node["recurrent"], buffer.bytes);
  else if (node.has("recurrent"))
    node["recurrent"].refuse("absent: only states of recurrences have it");
  const bool from_files = buffer.kind == BufferKind::kWeight || buffer.kind == BufferKind::kConstant;
  if (from_files) buffer.sources = buffer_sources(node["sources"], buffer, files);
  if (!from_files && node.has("sources"))
    node["sources"].refuse("absent: only weights and constants have them");
  return buffer;
}

ArgumentValue buffer_address(const CheckedJson& node, const GpuProgramRecord& program,
                             const BufferIndex& index) {
  const auto found = index.find(node["buffer"].text());
  if (found == index.end()) node["buffer"].refuse("the name of a buffer");
  const CheckedJson offset = node["offset"];
  const BufferAddress address{found->second, offset.number(0, program.buffers[found->second].bytes - 1)};
  if (address.offset % GpuProgramRecord::kAlignment != 0) offset.refuse("a multiple of 16");
  const auto& recurrent = program.buffers[found->second].recurrent;
  if (recurrent && std::ranges::find(recurrent->states, address.offset, &RecurrentRecord::State::offset) ==
                       recurrent->states.end())
    offset.refuse("where one of the buffer's states begins");
  return address;
}

HandOver hand_over(const CheckedJson& node, const GpuProgramRecord& program) {
  if (program.flags == 0) node.refuse("absent: the program has no flags");
  const CheckedJson number = node["flag"];
  const auto flag = static_cast<std::uint32_t>(number.number(0, program.all_flags() - 1));
  const bool of_weights = program.weight_stream && program.weight_stream->has(flag);
  if (flag >= program.flags && !program.of_stream(flag) && !of_weights)
    number.refuse("of a hand-over or of a stream");
  const std::string from = node["from"].text();
  const std::string to = node["to"].text();
  if ((from == program.device) == (to == program.device))
    node.refuse("from or to " + program.device + ", the program's device");
  const bool raises = from == program.device;
  const std::string& other = raises ? to : from;
  if (other != "cpu" && !device_number(other)) node[raises ? "to" : "from"].refuse("cpu, or gpu:N");
  if (flag >= program.flags && other != "cpu")
    node[raises ? "to" : "from"].refuse("cpu: it gives what is streamed");
  return {flag, raises, other};
}

ArgumentValue argument_value(const CheckedJson& node, const KernelArgument& argument,
                             const GpuProgramRecord& program, const BufferIndex& index) {
  const auto member = [&](const char* key) {
    if (!node.has(key)) node.refuse(std::string("a ") + key + ", for the kernel's argument " + argument.name);
    return node[key];
  };
  switch (argument.type) {
    case ArgumentType::kPointer:
      if (node.has("flag")) return hand_over(node, program);
      member("buffer");
      return buffer_address(node, program, index);
    case ArgumentType::kInt32:
      return static_cast<std::int32_t>(member("i32").integer(std::numeric_limits<std::int32_t>::min(),
                                                             std::numeric_limits<std::int32_t>::max()));
    case ArgumentType::kInt64:
      return member("i64").integer(std::numeric_limits<std::int64_t>::min(),
                                   std::numeric_limits<std::int64_t>::max());
    case ArgumentType::kFloat32:
      return static_cast<float>(member("f32").real());
  }
  node.refuse("an argument");
}

KernelNode kernel_node(const CheckedJson& node, const KernelsByName& kernels, const GpuProgramRecord& program,
                       const BufferIndex& index) {
  KernelNode result{node["kernel"].text(), {}, {}};
  if (node.has("role")) result.role = node["role"].text();
  if (node.has("layer")) result.layer = node["layer"].count(0);
  const auto kernel = kernels.find(result.kernel);
  if (kernel == kernels.end()) node["kernel"].refuse("a kernel that kernels.json has for this GPU");
  const auto grid = node["grid"].elements();
  if (grid.size() != 3) node["grid"].refuse("three numbers of blocks");
  for (std::size_t i = 0; i < 3; ++i)
    result.grid[i] = static_cast<std::uint32_t>(grid[i].number(1, i == 0 ? kMostBlocksX : kMostBlocksYZ));
  const auto arguments = node["arguments"].elements();
  const std::vector<KernelArgument>& wanted = kernel->second.arguments;
  if (arguments.size() != wanted.size())
    node["arguments"].refuse("a list of " + std::to_string(wanted.size()) + " values, as " + result.kernel +
                             " takes");
  for (std::size_t i = 0; i < wanted.size(); ++i)
    result.arguments.push_back(argument_value(arguments[i], wanted[i], program, index));
  return result;
}

// How often the graph waits for flags of a stream, and hands over behind that.
template <class OfStream>
std::pair<std::size_t, std::size_t> count_flags(const GraphRecord& graph, OfStream&& of_stream) {
  std::size_t waits = 0, raises = 0;
  for (const NodeRecord& record : graph.nodes)
    for (const HandOver* hand_over : record.hand_overs())
      if (of_stream(hand_over->flag)) ++(hand_over->raises ? raises : waits);
  return {waits, raises};
}

// A graph waits for all that is streamed and says when it has computed it, or has nothing to do with it.
void check_streams(const CheckedJson& node, GraphRecord& graph, const GpuProgramRecord& program) {
  const auto waves = count_flags(graph, [&](std::uint32_t flag) { return program.of_stream(flag); });
  if (waves != std::pair<std::size_t, std::size_t>()) {
    if (waves.first != program.stream->waves() || waves.second != waves.first)
      node.refuse("with a wait for each of the stream's waves and a hand-over behind it, or none");
    graph.streams = true;
  }
  const std::size_t n = graph.portions.size();
  const auto weights = count_flags(graph, [&](std::uint32_t flag) {
    return program.weight_stream && program.weight_stream->has(flag) &&
           flag - program.weight_stream->first_flag < n;
  });
  const auto all = count_flags(
      graph, [&](std::uint32_t flag) { return program.weight_stream && program.weight_stream->has(flag); });
  if (weights != std::pair(n, n) || all != weights)
    node.refuse("with a wait for each portion of weights and a hand-over behind it");
}

// Where a node's hand-over stands.
CheckedJson wrong_node(const CheckedJson& node) {
  return node[node.has("hand_over") ? "hand_over" : "arguments"];
}

GraphRecord graph_record(const CheckedJson& node, const KernelsByName& kernels,
                         const GpuProgramRecord& program, const BufferIndex& index) {
  const bool adapted = node.has("adapted") && node["adapted"].truth();
  if (adapted && !program.adapters) node["adapted"].refuse("false: there is no room for adapters");
  GraphRecord graph{node["batch"].count(1, kLargestBatch), node["exact"].truth(), adapted, false, {}, {}, {}};
  if (node.has("portions")) {
    if (!program.weight_stream) node["portions"].refuse("absent: no weights are streamed");
    const std::uint64_t ring = program.buffers[program.weight_stream->ring].bytes;
    graph.portions = program.weight_stream->portions(node["portions"], ring);
  }
  const auto nodes = node["nodes"].elements();
  if (nodes.empty() || nodes.size() > kMostNodes)
    node["nodes"].refuse("a list of 1 to " + std::to_string(kMostNodes) + " nodes");
  for (const CheckedJson& entry : nodes) {
    NodeRecord record;
    if (entry.has("hand_over"))
      record.work = hand_over(entry["hand_over"], program);
    else
      record.work = kernel_node(entry, kernels, program, index);
    for (const CheckedJson& before : entry["after"].elements())
      record.after.push_back(before.number(0, nodes.size() - 1));
    graph.nodes.push_back(std::move(record));
  }
  graph.order = topological_order(graph.nodes);
  if (graph.order.size() != graph.nodes.size()) node["nodes"].refuse("without a cycle in \"after\"");
  if (const auto wrong = wrong_hand_over(graph, program.flags))
    wrong_node(nodes[wrong->node]).refuse(wrong->expected);
  check_streams(node["nodes"], graph, program);
  return graph;
}

}  // namespace

std::vector<const HandOver*> NodeRecord::hand_overs() const {
  if (const auto* own = std::get_if<HandOver>(&work)) return {own};
  std::vector<const HandOver*> found;
  for (const ArgumentValue& value : std::get<KernelNode>(work).arguments)
    if (const auto* flag = std::get_if<HandOver>(&value)) found.push_back(flag);
  return found;
}

std::optional<int> device_number(const std::string& device) {
  constexpr std::string_view kKind = "gpu:";
  if (!device.starts_with(kKind)) return std::nullopt;
  int number = 0;
  const char* const end = device.data() + device.size();
  const auto [stop, error] = std::from_chars(device.data() + kKind.size(), end, number);
  if (error != std::errc() || stop != end || number < 0) return std::nullopt;
  return number;
}

GpuProgramRecord GpuProgramRecord::parse(std::string_view text, const std::string& where,
                                         const KernelsByName& kernels) {
  const nlohmann::json json = parse_json(text, where);
  const CheckedJson root(json, "", where);
  check_schema(root, kSchemaMajor, where);
  GpuProgramRecord program;
  program.device = root["device"].text();
  if (!device_number(program.device)) root["device"].refuse("gpu:N");
  program.device_bytes = root["device_bytes"].number(0, GpuProgramRecord::kMostBytes);
  program.flags = static_cast<std::uint32_t>(root["flags"].number(0, kMostFlags));
  program.sources = SourceRecord::parse(root);
  BufferIndex index;
  bool has_cache = false;
  for (const CheckedJson& node : root["buffers"].elements()) {
    program.buffers.push_back(buffer_record(node, program.sources));
    if (program.buffers.back().cache && std::exchange(has_cache, true))
      node["cache"].refuse("of one buffer alone");
    if (!index.emplace(program.buffers.back().name, program.buffers.size() - 1).second)
      node["name"].refuse("named once");
  }
  if (root.has("stream"))
    program.stream = StreamRecord::parse(root["stream"], program.buffers, program.flags, kMostFlags);
  if (root.has("weight_stream"))
    program.weight_stream =
        WeightStreamRecord::parse(root["weight_stream"], program.buffers, program.all_flags(), kMostFlags);
  if (root.has("expert_cache")) {
    if (!program.stream) root["expert_cache"].refuse("absent: nothing is streamed");
    program.expert_cache = ExpertCacheRecord::parse(root["expert_cache"], program.buffers, *program.stream);
  }
  if (root.has("adapters")) program.adapters = AdapterRecord::parse(root["adapters"], program.buffers);
  for (const CheckedJson& node : root["graphs"].elements()) {
    GraphRecord graph = graph_record(node, kernels, program, index);
    for (const GraphRecord& other : program.graphs)
      if (other.batch == graph.batch && other.adapted == graph.adapted)
        node["batch"].refuse("the only graph of its batch size");
    program.graphs.push_back(std::move(graph));
  }
  if (program.graphs.empty()) root["graphs"].refuse("a list of at least one graph");
  const auto adapted = std::ranges::count(program.graphs, true, &GraphRecord::adapted);
  if (program.adapters && 2 * adapted != std::ssize(program.graphs))
    root["graphs"].refuse("graphs with and without adapters, as many of each");
  return program;
}

}  // namespace hetcomp::gpu
