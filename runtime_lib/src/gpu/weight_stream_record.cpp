#include "weight_stream_record.h"

#include "program_record.h"

namespace hetcomp::gpu {
namespace {

constexpr std::uint64_t kMostWeights = 1U << 24;

}  // namespace

WeightStreamRecord WeightStreamRecord::parse(const CheckedJson& node,
                                             const std::vector<BufferRecord>& buffers,
                                             std::uint32_t first_free, std::uint64_t most_flags) {
  WeightStreamRecord record{};
  record.ring = buffer_index(node["buffer"], buffers, BufferKind::kStream, "of kind stream");
  record.first_flag = static_cast<std::uint32_t>(node["first_flag"].number(first_free, most_flags));
  record.flags = static_cast<std::uint32_t>(node["flags"].number(1, most_flags - record.first_flag));
  return record;
}

std::vector<WeightPortion> WeightStreamRecord::portions(const CheckedJson& node,
                                                        std::uint64_t ring_bytes) const {
  std::vector<WeightPortion> found;
  for (const CheckedJson& entry : node.elements()) {
    const auto flag = static_cast<std::uint32_t>(entry["flag"].number(first_flag, first_flag + flags - 1));
    if (flag != first_flag + found.size()) entry["flag"].refuse("the one behind that of the portion before");
    WeightPortion portion{flag, std::nullopt, {}};
    if (entry.has("after")) {
      if (found.empty()) entry["after"].refuse("absent: it is the first portion");
      portion.after = static_cast<std::uint32_t>(entry["after"].number(first_flag, flag - 1));
    }
    for (const CheckedJson& copy : entry["copies"].elements()) {
      const WeightCopy made{copy["weight"].number(0, kMostWeights), copy["bytes"].number(1, ring_bytes),
                            copy["to"].number(0, ring_bytes)};
      if (made.bytes > ring_bytes - made.to)
        copy.refuse("inside the ring (" + std::to_string(ring_bytes) + " bytes)");
      portion.copies.push_back(made);
    }
    if (portion.copies.empty()) entry["copies"].refuse("a list of at least one copy");
    found.push_back(std::move(portion));
  }
  return found;
}

}  // namespace hetcomp::gpu
