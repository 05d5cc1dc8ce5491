#include "adapter_record.h"

#include "program_record.h"

namespace hetcomp::gpu {
namespace {

constexpr std::int32_t kMostSlots = 1 << 10;
// Together with the greatest rank, bytes of a pair are far from the end of 64 bits.
constexpr std::int64_t kMostMatrices = 1 << 16;
constexpr std::int64_t kLargestSize = 1 << 24;

hetcomp_adaptable adaptable(const CheckedJson& node) {
  const hetcomp_adaptable shape{
      node["matrices"].integer(1, kMostMatrices), node["rows"].integer(1, kLargestSize),
      node["columns"].integer(1, kLargestSize), node["halves"].count(1, 2), node["number_bytes"].count(2, 4)};
  if (shape.number_bytes == 3) node["number_bytes"].refuse("2 or 4");
  if (shape.out % shape.halves != 0) node["rows"].refuse("of whole halves");
  return shape;
}

}  // namespace

AdapterRecord AdapterRecord::parse(const CheckedJson& node, const std::vector<BufferRecord>& buffers) {
  AdapterRecord record{node["slots"].count(1, kMostSlots),
                       node["rank"].integer(1, Adapter::kLargestRank),
                       node["experts"].truth(),
                       buffer_index(node["pairs"], buffers, BufferKind::kPairs, "of kind pairs"),
                       buffer_index(node["table"]["buffer"], buffers, BufferKind::kPairs, "of kind pairs"),
                       0,
                       {}};
  record.bytes = buffers[record.pairs].bytes;
  for (const CheckedJson& entry : node["weights"].elements())
    record.weights.push_back({entry["name"].text(), adaptable(entry)});
  const std::uint64_t row = kWords * sizeof(std::int64_t) * static_cast<std::uint64_t>(record.slots);
  node["table"]["row_bytes"].number(row, row);
  if (buffers[record.table].bytes != row * (record.weights.size() + 1))
    node["weights"].refuse("as many as the table has rows, less one");
  return record;
}

}  // namespace hetcomp::gpu
