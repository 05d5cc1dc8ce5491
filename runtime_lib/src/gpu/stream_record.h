// "stream" of gpu/program-N.json: experts that are copied from the host's memory to the GPU in steps of a
// prompt, checked.
#pragma once

#include <cstdint>
#include <string>
#include <vector>

#include "../checked_json.h"
#include "stream_split.h"

namespace hetcomp::gpu {

struct BufferRecord;
enum class BufferKind;

// The index of the buffer of that kind that `node` names; refuses others. what: "of kind ..", for the
// message.
std::size_t buffer_index(const CheckedJson& node, const std::vector<BufferRecord>& buffers, BufferKind kind,
                         const char* what);

// A weight of the CPU's program (its number in the manifest) with the experts that it has, one after the
// other.
struct ExpertSource {
  std::size_t weight;
  std::vector<std::int32_t> experts;
};

struct StreamOperand {
  std::size_t buffer;
  std::uint64_t offset;  // of slot 0 of the layer's half
  std::uint64_t expert_bytes;
  std::vector<ExpertSource> sources;
};

struct StreamLayer {
  std::uint32_t hand_over;  // with which the CPU gets the layer's routing
  std::int32_t experts;
  std::int32_t top_k;
  std::int32_t hidden;
  std::size_t ids;  // the pinned buffer with the routing
  std::vector<StreamOperand> operands;
};

// Flag `first_flag + i`, behind those of hand-overs and of other programs' streams, is raised when the
// experts of layer i that are copied are there. Row i + 1 of the tables has layer i's slots by expert, and
// whether the CPU has a part in its sum; row i also whether the CPU wants its input.
struct StreamRecord {
  std::size_t slots;
  std::uint32_t first_flag;
  std::size_t tables;  // the buffer
  std::uint64_t row_bytes;
  std::uint64_t part_offset;
  std::uint64_t ask_offset;
  StreamRates rates;
  std::vector<StreamLayer> layers;

  static StreamRecord parse(const CheckedJson& node, const std::vector<BufferRecord>& buffers,
                            std::uint32_t flags, std::uint64_t most_flags);
};

}  // namespace hetcomp::gpu
