// "expert_cache" of gpu/program.json: experts in slots of the GPU that change between steps, checked.
#pragma once

#include <cstdint>
#include <vector>

#include "../checked_json.h"
#include "cache_policy.h"
#include "stream_record.h"

namespace hetcomp::gpu {

struct CacheOperand {
  std::size_t buffer;
  std::uint64_t offset;  // of slot 0 of the layer
};

// Of a layer that is also a stream's.
struct CacheLayer {
  std::vector<CacheOperand> operands;  // as the stream's
  std::vector<std::int32_t> first;     // experts at load: in slot 0, in slot 1, ..
  std::size_t sum;                     // the pinned buffer that the CPU writes its experts' sum to
};

// Row i of the table says in which slot of layer i each expert lies, -1: in none.
struct ExpertCacheRecord {
  CacheRule rule;
  std::int32_t slots;
  std::uint64_t bytes_per_step;
  std::size_t table;  // the buffer
  std::uint64_t row_bytes;
  std::vector<CacheLayer> layers;  // as the stream's

  static ExpertCacheRecord parse(const CheckedJson& node, const std::vector<BufferRecord>& buffers,
                                 const StreamRecord& stream);
};

}  // namespace hetcomp::gpu
