#include "stream_record.h"

#include <set>

#include "program_record.h"

namespace hetcomp::gpu {

std::size_t buffer_index(const CheckedJson& node, const std::vector<BufferRecord>& buffers, BufferKind kind,
                         const char* what) {
  const std::string name = node.text();
  for (std::size_t i = 0; i < buffers.size(); ++i)
    if (buffers[i].name == name && buffers[i].kind == kind) return i;
  node.refuse(std::string("the name of a buffer ") + what);
}

namespace {

constexpr std::int32_t kMostExperts = 1 << 14;
constexpr std::int32_t kMostWidth = 1 << 24;
constexpr std::size_t kMostPoints = 64;
constexpr std::uint32_t kMostWaves = 1U << 14;  // of all layers

TimeCurve time_curve(const CheckedJson& node) {
  std::vector<std::pair<std::int64_t, double>> points;
  for (const CheckedJson& entry : node.elements()) {
    const auto pair = entry.elements();
    if (pair.size() != 2) entry.refuse("tokens and microseconds");
    const auto tokens =
        pair[0].count(points.empty() ? 1 : static_cast<std::int32_t>(points.back().first) + 1);
    const double us = pair[1].real();
    if (!(us >= 0 && us < 1e9)) pair[1].refuse("microseconds");
    points.emplace_back(tokens, us);
  }
  if (points.empty() || points.size() > kMostPoints) node.refuse("a list of some points");
  return TimeCurve(std::move(points));
}

StreamRates stream_rates(const CheckedJson& node) {
  const double link = node["link_gb_per_s"].real();
  if (!(link > 0 && link < 1e6)) node["link_gb_per_s"].refuse("a bandwidth");
  const double joint = node["joint_gb_per_s"].real();
  if (!(joint >= link && joint < 1e6)) node["joint_gb_per_s"].refuse("a bandwidth, no less than the link's");
  return {link * 1e3, joint * 1e3, time_curve(node["cpu_expert_us"]), time_curve(node["gpu_expert_us"])};
}

ExpertSource expert_source(const CheckedJson& node, std::int32_t experts, std::set<std::int32_t>& seen) {
  ExpertSource source{node["weight"].number(0, 1U << 24), {}};
  for (const CheckedJson& run : node["experts"].elements()) {
    const auto borders = run.elements();
    if (borders.size() != 2) run.refuse("first and end of a run of experts");
    const std::int32_t first = borders[0].count(0, experts);
    const std::int32_t end = borders[1].count(first, experts);
    for (std::int32_t e = first; e < end; ++e) {
      if (!seen.insert(e).second) run.refuse("experts that no other run has");
      source.experts.push_back(e);
    }
  }
  return source;
}

StreamOperand stream_operand(const CheckedJson& node, const std::vector<BufferRecord>& buffers,
                             std::size_t slots, std::int32_t experts, std::set<std::int32_t>& seen) {
  StreamOperand operand{buffer_index(node["buffer"], buffers, BufferKind::kStream, "of kind stream"), 0, {}};
  const std::uint64_t bytes = buffers[operand.buffer].bytes;
  operand.expert_bytes = node["expert_bytes"].number(1, bytes);
  if (operand.expert_bytes > bytes / slots)
    node["expert_bytes"].refuse("so few that all slots lie inside the buffer");
  for (const CheckedJson& source : node["sources"].elements())
    operand.sources.push_back(expert_source(source, experts, seen));
  return operand;
}

// Behind the layers that the record has already.
StreamLayer stream_layer(const CheckedJson& node, const std::vector<BufferRecord>& buffers,
                         const StreamRecord& record, std::uint32_t flags) {
  const bool first_layer = record.layers.empty();
  const std::uint32_t first_flag = first_layer ? 0 : record.layers.back().hand_over + 1;
  if (first_flag >= flags) node["hand_over"].refuse("absent: there are no hand-overs left for it");
  StreamLayer layer{static_cast<std::uint32_t>(node["hand_over"].number(first_flag, flags - 1)),
                    node["experts"].count(1, kMostExperts),
                    node["top_k"].count(1, kMostExperts),
                    node["hidden"].count(1, kMostWidth),
                    buffer_index(node["ids"], buffers, BufferKind::kPinnedOut, "of kind pinned_out"),
                    static_cast<std::uint32_t>(node["waves"].number(1, kMostWaves)),
                    first_layer ? 0 : record.waves(),
                    first_layer ? 1 : record.rows(),
                    time_curve(node["spine_us"]),
                    {}};
  if (layer.waves > kMostWaves - layer.first_wave)
    node["waves"].refuse("so few that all layers have at most " + std::to_string(kMostWaves));
  std::set<std::int32_t> first;
  for (const CheckedJson& entry : node["operands"].elements()) {
    std::set<std::int32_t> seen;
    layer.operands.push_back(stream_operand(entry, buffers, record.slots, layer.experts, seen));
    if (layer.operands.size() == 1) first = seen;
    if (seen != first) entry["sources"].refuse("the same experts as the other operands");
  }
  if (layer.operands.empty()) node["operands"].refuse("a list of weights");
  return layer;
}

}  // namespace

StreamRecord StreamRecord::parse(const CheckedJson& node, const std::vector<BufferRecord>& buffers,
                                 std::uint32_t flags, std::uint64_t most_flags) {
  const CheckedJson tables = node["tables"];
  const std::size_t slots = node["slots"].number(1, kMostExperts);
  StreamRecord record{slots,
                      node["wave"].number(1, slots),
                      static_cast<std::uint32_t>(node["first_flag"].number(flags, flags + most_flags)),
                      buffer_index(tables["buffer"], buffers, BufferKind::kStream, "of kind stream"),
                      tables["row_bytes"].number(1, 1U << 20),
                      tables["part_offset"].number(0, 1U << 20),
                      tables["ask_offset"].number(0, 1U << 20),
                      stream_rates(node["rates"]),
                      {}};
  for (const CheckedJson& entry : node["layers"].elements()) {
    record.layers.push_back(stream_layer(entry, buffers, record, flags));
    if (4 * static_cast<std::uint64_t>(record.layers.back().experts) > record.part_offset)
      tables["part_offset"].refuse("behind the slots of all experts");
  }
  if (record.layers.empty()) node["layers"].refuse("a list of layers");
  const auto inside = [&](std::uint64_t offset) {
    return offset % GpuProgramRecord::kAlignment == 0 && offset + 4 <= record.row_bytes;
  };
  if (!inside(record.part_offset) || !inside(record.ask_offset) || record.ask_offset <= record.part_offset)
    tables.refuse("rows with part_offset and ask_offset inside, multiples of 16");
  if (record.row_bytes % GpuProgramRecord::kAlignment != 0 ||
      record.rows() * record.row_bytes > buffers[record.tables].bytes)
    tables["row_bytes"].refuse("so few that the rows of all layers lie inside the buffer");
  return record;
}

}  // namespace hetcomp::gpu
