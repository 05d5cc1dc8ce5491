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
  std::size_t buffer;  // with the slots
  std::uint64_t expert_bytes;
  std::vector<ExpertSource> sources;
};

struct StreamLayer {
  std::uint32_t hand_over;  // with which the CPU gets the layer's routing
  std::int32_t experts;
  std::int32_t top_k;
  std::int32_t hidden;
  std::size_t ids;           // the pinned buffer with the routing
  std::uint32_t waves;       // groups of experts that are computed one after the other
  std::uint32_t first_wave;  // in the count of all layers' waves
  std::size_t row;           // of the tables: of the first wave
  // What GPUs do between the layer before and this one's routing, in a step of so many tokens.
  TimeCurve spine_us;
  std::vector<StreamOperand> operands;
};

// Flag `first_flag + w`, behind those of hand-overs and of other programs' streams, is raised to the GPU when
// the experts of wave w are there, and by the GPU when it has computed them. The tables have rows of slots by
// expert: for every layer those of each wave, then one of all waves, with whether the CPU has a part in the
// layer's sum, and whether it wants the next layer's input. Row 0 has the latter for the first layer.
struct StreamRecord {
  std::size_t slots;  // in each buffer; they are filled in turns
  std::size_t wave;   // experts of one, at most; no more than slots
  std::uint32_t first_flag;
  std::size_t tables;  // the buffer
  std::uint64_t row_bytes;
  std::uint64_t part_offset;
  std::uint64_t ask_offset;
  StreamRates rates;
  std::vector<StreamLayer> layers;

  std::uint32_t waves() const { return layers.back().first_wave + layers.back().waves; }
  std::size_t rows() const { return layers.back().row + layers.back().waves + 1; }

  static StreamRecord parse(const CheckedJson& node, const std::vector<BufferRecord>& buffers,
                            std::uint32_t flags, std::uint64_t most_flags);
};

}  // namespace hetcomp::gpu
