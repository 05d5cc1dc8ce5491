#include "expert_cache_record.h"

#include <set>

#include "program_record.h"

namespace hetcomp::gpu {
namespace {

CacheRule cache_rule(const CheckedJson& node) {
  const std::string rule = node.text();
  if (rule == "lru") return CacheRule::kLru;
  if (rule == "lfu") return CacheRule::kLfu;
  node.refuse("lru or lfu");
}

CacheOperand cache_operand(const CheckedJson& node, const std::vector<BufferRecord>& buffers,
                           std::size_t slots, const StreamOperand& streamed) {
  CacheOperand operand{buffer_index(node["buffer"], buffers, BufferKind::kStream, "of kind stream"), 0};
  const std::uint64_t bytes = buffers[operand.buffer].bytes;
  operand.offset = node["offset"].number(0, bytes);
  if (operand.offset % GpuProgramRecord::kAlignment != 0 ||
      streamed.expert_bytes > (bytes - operand.offset) / slots)
    node["offset"].refuse("a multiple of 16 with room for all slots behind it");
  return operand;
}

std::set<std::int32_t> experts_of(const StreamOperand& operand) {
  std::set<std::int32_t> found;
  for (const ExpertSource& source : operand.sources)
    found.insert(source.experts.begin(), source.experts.end());
  return found;
}

CacheLayer cache_layer(const CheckedJson& node, const std::vector<BufferRecord>& buffers, std::size_t slots,
                       const StreamLayer& streamed) {
  const auto entries = node["operands"].elements();
  if (entries.size() != streamed.operands.size()) node["operands"].refuse("a list as long as the stream's");
  CacheLayer layer{{}, {}, buffer_index(node["sum"], buffers, BufferKind::kPinnedIn, "of kind pinned_in")};
  for (std::size_t i = 0; i < entries.size(); ++i)
    layer.operands.push_back(cache_operand(entries[i], buffers, slots, streamed.operands[i]));
  const std::set<std::int32_t> sources = experts_of(streamed.operands.front());
  if (sources.size() != static_cast<std::size_t>(streamed.experts))
    node.refuse("of a layer whose experts all have a source in the stream");
  std::set<std::int32_t> seen;
  for (const CheckedJson& entry : node["first"].elements()) {
    layer.first.push_back(entry.count(0, streamed.experts - 1));
    if (!seen.insert(layer.first.back()).second) entry.refuse("an expert that no other slot has");
  }
  if (layer.first.size() > slots) node["first"].refuse("a list no longer than there are slots");
  return layer;
}

}  // namespace

ExpertCacheRecord ExpertCacheRecord::parse(const CheckedJson& node, const std::vector<BufferRecord>& buffers,
                                           const StreamRecord& stream) {
  std::int32_t fewest = stream.layers.front().experts;
  for (const StreamLayer& layer : stream.layers) fewest = std::min(fewest, layer.experts);
  ExpertCacheRecord record{
      cache_rule(node["policy"]),
      node["slots"].count(1, fewest),
      node["bytes_per_step"].number(0, GpuProgramRecord::kMostBytes),
      buffer_index(node["table"]["buffer"], buffers, BufferKind::kStream, "of kind stream"),
      node["table"]["row_bytes"].number(1, 1U << 20),
      {}};
  const auto entries = node["layers"].elements();
  if (entries.size() != stream.layers.size()) node["layers"].refuse("a list as long as the stream's");
  for (std::size_t i = 0; i < entries.size(); ++i) {
    if (4 * static_cast<std::uint64_t>(stream.layers[i].experts) > record.row_bytes)
      node["table"]["row_bytes"].refuse("so many that a row has a number for each expert");
    record.layers.push_back(
        cache_layer(entries[i], buffers, static_cast<std::size_t>(record.slots), stream.layers[i]));
  }
  if (record.row_bytes % GpuProgramRecord::kAlignment != 0 ||
      entries.size() * record.row_bytes > buffers[record.table].bytes)
    node["table"]["row_bytes"].refuse("a multiple of 16 with which all rows lie inside the buffer");
  return record;
}

}  // namespace hetcomp::gpu
