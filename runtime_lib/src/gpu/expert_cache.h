// Keeps the hot experts of each layer in slots of the GPU's memory, while all of them stay in the host's.
//
// Which experts are in slots changes between steps of decoding: a slot that gets another expert is in no
// table during the next step, under which the copy runs, and in the table of the step after it. The CPU
// computes what is in no slot. See docs/decisions/expert-cache.md.
#pragma once

#include <cstdint>
#include <span>
#include <string>
#include <vector>

#include "cache_policy.h"
#include "device_context.h"
#include "device_memory.h"
#include "expert_sources.h"
#include "program_buffers.h"
#include "program_record.h"

namespace hetcomp::gpu {

struct CacheStatistics {
  std::int64_t hits = 0;  // choices of decoded tokens whose expert was in a slot
  std::int64_t misses = 0;
  std::int64_t swaps = 0;  // experts that came into slots
  std::int64_t bytes = 0;  // copied for it
};

class ExpertCache {
 public:
  // program: with a cache; all must outlive this. The context must be current, as it must be whenever this is
  // used.
  ExpertCache(const CudaDriver& driver, const DeviceContext& context, const GpuProgramRecord& program,
              const ProgramBuffers& buffers, CUstream step_stream);

  // Fills the slots from the CPU's weights, which must stay where they are. swaps: they are pinned, and
  // experts may change places. Throws Error.
  void fill(const HostWeights& weights, bool swaps);

  // Before the graph of a step of so many tokens is launched: sends the table, and begins to copy what the
  // next step will have.
  void begin(std::int64_t tokens, bool decode);
  // When the CPU has the routing of hand-over `flag`: notes it. Other hand-overs are left alone.
  void count(std::uint32_t flag);
  // Then: takes from the CPU what the GPU has in slots, whose choices become -1. Where nothing is left in a
  // step of decoding, the CPU's sum is set to zero.
  void leave_to_cpu(std::uint32_t flag);
  // When the GPU is at rest: waits for the copies.
  void end() noexcept;

  // In this step.
  bool holds(std::size_t layer, std::int32_t expert) const {
    return policy_.slots(layer)[static_cast<std::size_t>(expert)] != CachePolicy::kNone;
  }
  // By hand-over: 1 where the CPU has nothing to compute in this step of decoding.
  const std::uint8_t* skip() const { return skip_.data(); }
  const CacheStatistics& statistics() const { return statistics_; }
  void reset_statistics();
  // How often each expert was chosen since the last reset, as a statistics file of the compiler.
  std::string expert_statistics_json() const;

 private:
  static constexpr std::size_t kNoLayer = static_cast<std::size_t>(-1);

  std::span<std::int32_t> choices(std::size_t layer) const;
  void send_table();
  void copy(const CacheArrival& arrival, CUstream stream);

  const CudaDriver& driver_;
  const DeviceContext& context_;
  const StreamRecord& stream_record_;
  const ExpertCacheRecord& record_;
  const ProgramBuffers& buffers_;
  CUstream step_stream_;
  StreamHandle copies_;
  PinnedMemory table_;
  CachePolicy policy_;
  std::vector<std::size_t> layer_of_;  // by hand-over
  std::vector<std::vector<ExpertAddresses>> sources_;
  std::vector<std::uint8_t> skip_;
  CacheStatistics statistics_;
  bool swaps_ = false;
  bool decode_ = false;
  bool table_is_old_ = true;          // the GPU's
  std::vector<CacheArrival> coming_;  // experts whose copies are on their way, if all_begun_
  bool all_begun_ = false;
  std::int64_t tokens_ = 0;       // of the step; 0: none runs
  std::int64_t tokens_seen_ = 0;  // since the last reset
};

}  // namespace hetcomp::gpu
