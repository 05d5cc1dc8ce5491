// Keeps the hot experts of a GPU's layers in slots of its memory, while all of them stay in the host's.
//
// Which experts are in slots changes between steps of decoding: a slot that gets another expert is in no
// table during the next step, under which the copy runs, and in the table of the step after it. In a step of
// a prompt experts that are streamed to the GPU may stay in slots. The CPU computes what is in no slot. See
// docs/decisions/expert-cache.md.
#pragma once

#include <cstdint>
#include <span>
#include <vector>

#include "cache_policy.h"
#include "device_memory.h"
#include "expert_copies.h"
#include "expert_sources.h"
#include "program_buffers.h"
#include "program_record.h"
#include "shared_memory.h"

namespace hetcomp::gpu {

struct CacheStatistics {
  std::int64_t hits = 0;  // choices of decoded tokens whose expert was in a slot
  std::int64_t misses = 0;
  std::int64_t swaps = 0;  // experts that came into slots in steps of decoding
  std::int64_t bytes = 0;  // copied to the GPU for it
  std::int64_t kept = 0;   // experts that stayed in slots after they were streamed

  CacheStatistics& operator+=(const CacheStatistics& other) {
    hits += other.hits;
    misses += other.misses;
    swaps += other.swaps;
    bytes += other.bytes;
    kept += other.kept;
    return *this;
  }
};

class ExpertCache {
 public:
  // program: with a cache; all must outlive this. The context must be current when this is made, when it ends
  // and during fill(), begin(), copy_next(), look_ahead() and end().
  ExpertCache(const CudaDriver& driver, const GpuProgramRecord& program, const ProgramBuffers& buffers,
              const SharedMemory& shared, CUstream step_stream, ExpertCopies& copies);

  // Fills the slots from the CPU's weights in the manifest's order, which must stay where they are. swaps:
  // experts may change places. Throws Error.
  void fill(std::span<const std::span<const std::uint8_t>> weights, bool swaps);

  // Before the graph of a step of so many tokens is launched: sends the table, and decides what is copied
  // under a step of decoding for the next one.
  void begin(std::int64_t tokens, bool decode);
  // Begins to copy one more of these experts: asking for a copy takes the driver longer (6 us) than it may
  // keep a step waiting, but no longer than the CPU waits for the GPU in a layer.
  void copy_next();
  bool all_begun() const { return !decode_ || begun_ == coming_.size(); }
  // When the CPU has the routing of hand-over `flag`: notes it. Other hand-overs are left alone.
  void count(std::uint32_t flag);
  // Then: takes from the CPU what the GPU has in slots, whose choices become -1. Where nothing is left in a
  // step of decoding, the CPU skips the layer and its sum is set to zero.
  void leave_to_cpu(std::uint32_t flag);
  // In a step of a prompt, when the layer was counted: which of its experts that are streamed stay, and in
  // which slots.
  std::vector<CacheArrival> keep(std::size_t layer, std::span<const std::int32_t> streamed);
  // Copies one of them to its slot: `from` has its operands, in the layer's order. The GPU must have computed
  // the layer.
  void take(const CacheArrival& arrival, std::span<const CUdeviceptr> from);
  // In a step of decoding, when the CPU has done its part and the GPU comes to its end: has what is left
  // copied, waits for the copies, and looks for what begin() will decide next.
  void look_ahead();
  // When the GPU is at rest: has what is left copied, and waits for the copies. streamed: whether those of
  // take() are over, without a fault. Without a begin() nothing happens.
  void end(bool streamed) noexcept;

  // In this step.
  bool holds(std::size_t layer, std::int32_t expert) const {
    return policy_.slots(layer)[static_cast<std::size_t>(expert)] != CachePolicy::kNone;
  }
  const CacheStatistics& statistics() const { return statistics_; }
  void reset_statistics();

 private:
  static constexpr std::size_t kNoLayer = static_cast<std::size_t>(-1);

  // A layer's routing and the CPU's sum, as the CPU sees them.
  struct Exchanged {
    std::span<std::byte> ids, sum;
  };

  std::span<std::int32_t> choices(std::size_t layer) const;
  void send_table();
  CUdeviceptr slot(const CacheArrival& arrival, std::size_t operand) const;
  void copy(const CacheArrival& arrival);
  bool copy_rest() noexcept;
  void settle(bool streamed) noexcept;  // the tables take what was copied

  const CudaDriver& driver_;
  const GpuProgramRecord& program_;
  const StreamRecord& stream_record_;
  const ExpertCacheRecord& record_;
  const ProgramBuffers& buffers_;
  const SharedMemory& shared_;
  CUstream step_stream_;
  ExpertCopies& copies_;
  PinnedMemory table_;
  CachePolicy policy_;
  std::vector<std::size_t> layer_of_;  // by hand-over
  std::vector<Exchanged> exchanged_;   // by layer
  std::vector<std::vector<ExpertAddresses>> sources_;
  CacheStatistics statistics_;
  bool swaps_ = false;
  bool decode_ = false;
  bool table_is_old_ = true;          // the GPU's
  std::vector<CacheArrival> coming_;  // experts that are copied in this step
  std::size_t begun_ = 0;             // of decoding: so many of them
  std::size_t taken_ = 0;             // of those that stay in this step
  std::int64_t tokens_ = 0;           // of the step; 0: none runs
};

}  // namespace hetcomp::gpu
