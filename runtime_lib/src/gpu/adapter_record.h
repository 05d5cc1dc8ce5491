// "adapters" of gpu/program.json: memory for the pairs of LoRA adapters that come and go, checked.
#pragma once

#include <cstdint>
#include <vector>

#include "../adapter.h"
#include "../checked_json.h"

namespace hetcomp::gpu {

struct BufferRecord;

// The table has for each weight a row of `slots` entries: where a and b of the slot's pair begin in the
// buffer of pairs, in numbers, the pair's rank (0: none), and the bits of its scale; four i64 each.
struct AdapterRecord {
  static constexpr std::size_t kWords = 4;

  std::int32_t slots;
  std::int64_t rank;    // the greatest that kernels can add
  bool experts;         // the experts that the program computes are among the weights
  std::size_t pairs;    // the buffer
  std::size_t table;    // the buffer, with one row more than there are weights
  std::uint64_t bytes;  // of the buffer of pairs
  std::vector<GpuAdaptable::Weight> weights;

  static AdapterRecord parse(const CheckedJson& node, const std::vector<BufferRecord>& buffers);
};

}  // namespace hetcomp::gpu
