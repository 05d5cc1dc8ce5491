// "weight_stream" of gpu/program-N.json, and "portions" of its graphs: weights of the CPU that are copied to
// the GPU in long steps of a prompt, checked.
#pragma once

#include <cstdint>
#include <optional>
#include <vector>

#include "../checked_json.h"

namespace hetcomp::gpu {

struct BufferRecord;

struct WeightCopy {
  std::size_t weight;  // the CPU program's, its number in the manifest: all of it
  std::uint64_t bytes;
  std::uint64_t to;  // offset in the ring
};

// What is copied together. Its flag is raised to the GPU when it is there, and by the GPU when it has been
// read.
struct WeightPortion {
  std::uint32_t flag;
  std::optional<std::uint32_t> after;  // of an earlier portion, which must have been read before
  std::vector<WeightCopy> copies;
};

// Flags [first_flag, first_flag + flags) lie behind those of hand-overs, of streamed experts and of other
// programs' weights.
struct WeightStreamRecord {
  std::size_t ring;  // the buffer
  std::uint32_t first_flag;
  std::uint32_t flags;

  bool has(std::uint32_t flag) const { return flag >= first_flag && flag - first_flag < flags; }

  static WeightStreamRecord parse(const CheckedJson& node, const std::vector<BufferRecord>& buffers,
                                  std::uint32_t first_free, std::uint64_t most_flags);
  // Of a graph: one after the other, each within the ring of so many bytes.
  std::vector<WeightPortion> portions(const CheckedJson& node, std::uint64_t ring_bytes) const;
};

}  // namespace hetcomp::gpu
