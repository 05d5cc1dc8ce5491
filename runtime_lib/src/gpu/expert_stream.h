// Copies experts from the host's memory to the GPU while it computes, in steps of a prompt.
//
// A layer's copies begin when the routing of the layer before is known, with those experts that are likely to
// be needed; when its own is known it is decided how many more are copied, and the rest is the CPU's. Slots
// are filled one after the other, around and around: a copy waits until the GPU has computed the wave of
// experts that had its slot before, the GPU's kernels wait for the copies of a wave. See
// docs/decisions/expert-streaming.md.
#pragma once

#include <cstddef>
#include <cstdint>
#include <optional>
#include <span>
#include <vector>

#include "device_context.h"
#include "device_memory.h"
#include "expert_cache.h"
#include "expert_copies.h"
#include "expert_sources.h"
#include "program_buffers.h"
#include "program_record.h"
#include "shared_memory.h"
#include "stream_split.h"

namespace hetcomp::gpu {

struct StreamStatistics {
  std::int64_t layers = 0;          // that streamed anything
  std::int64_t experts_copied = 0;  // to the GPU
  std::int64_t experts_wanted = 0;  // that some token chose, of those that the GPU has not got
  std::int64_t bytes = 0;           // copied

  StreamStatistics& operator+=(const StreamStatistics& other) {
    layers += other.layers;
    experts_copied += other.experts_copied;
    experts_wanted += other.experts_wanted;
    bytes += other.bytes;
    return *this;
  }
};

class ExpertStream {
 public:
  // program: with a stream; cache: null, or what holds experts that need not be copied, and may keep some
  // that are; all must outlive this. The context must be current when this is made, when it ends and during
  // begin() and end().
  ExpertStream(const CudaDriver& driver, const DeviceContext& context, const GpuProgramRecord& program,
               const ProgramBuffers& buffers, const SharedMemory& shared, CUstream step_stream,
               ExpertCopies& copies, ExpertCache* cache);

  // The CPU's weights in the manifest's order, which must stay where they are. Until then nothing is
  // copied: the CPU computes all that the GPU has not got. Throws Error: a source lies beyond its weight.
  void attach(std::span<const std::span<const std::uint8_t>> weights);
  bool attached() const { return attached_; }

  // Before the graph of a step of so many tokens is launched; its stream flags are this object's. 0: nothing
  // is copied.
  void begin(std::int64_t tokens);
  // When the CPU has the routing of hand-over `flag`: decides, and leaves to the CPU what the GPU does not
  // compute: the other choices become -1. Hand-overs that are no streamed layer's are left alone.
  void route(std::uint32_t flag);
  // When the GPU is at rest, or was given up: when all copies are over. False: some of them failed. Without a
  // begin() nothing happens.
  bool end() noexcept;

  const StreamStatistics& statistics() const { return statistics_; }
  void reset_statistics() { statistics_ = {}; }

 private:
  static constexpr std::int64_t kNobody = -1;

  struct Operand {
    CUdeviceptr slots;
    std::uint64_t expert_bytes;
    ExpertAddresses sources;
  };
  struct Layer {
    std::vector<Operand> operands;
    std::vector<std::int32_t> cpu_experts;  // ascending
    std::vector<std::int32_t> streamable;   // in this step: of them those that the GPU has not got
    std::vector<std::int32_t> order;        // in this step: those to copy, one after the other
    std::size_t first_slot = 0;             // in this step: of the first of them
    std::size_t copied = 0;                 // of them, so far
    double lead_us = 0;                     // in this step: see SplitInput
    std::size_t most_ahead = 0;             // in this step: copies before the routing is known
    std::vector<std::int32_t> cache_slot;   // in this step: by expert, where one that is copied stays
    bool asked = true;                      // whether the CPU gets the layer's input
    std::uint64_t expert_bytes = 0;         // of all operands
  };
  struct Slot {
    std::int64_t reader = kNobody;      // in this step: the wave of what it holds
    std::optional<CacheArrival> stays;  // what it holds goes to the cache before it is overwritten
  };

  std::size_t expect(std::size_t index);
  std::span<std::int32_t> choices(const StreamLayer& record) const;
  std::size_t decide(std::size_t index, const std::vector<std::int32_t>& count);
  Split split(std::size_t index, std::span<const std::int32_t> tokens, std::size_t copied, std::size_t ahead,
              double resident_us) const;
  void keep(std::size_t index, std::size_t streamed);
  void copy(std::size_t index, std::size_t to);
  void copy_run(std::size_t index, std::size_t end);
  void fill_slot(std::size_t index, std::size_t place);
  bool adjoins(std::size_t index, std::size_t next) const;
  void make_room(std::size_t slot);
  void stay(Slot& slot, std::size_t number);
  void copy_ahead(std::size_t index, std::size_t wanted);
  void leave_to_cpu(std::size_t index, std::span<std::int32_t> ids, std::size_t streamed);
  CUdeviceptr table(std::size_t row) const;
  void send_with_step(std::size_t rows);
  void send_waves(std::size_t index, std::size_t streamed);
  std::size_t slot_of(const Layer& layer, std::size_t place) const {
    return (layer.first_slot + place) % record_.slots;
  }
  std::int64_t wave_of(std::size_t index, std::size_t place) const {
    return static_cast<std::int64_t>(record_.layers[index].first_wave + place / record_.wave);
  }
  std::size_t most_of(const StreamLayer& record) const { return record.waves * record_.wave; }
  std::span<std::int32_t> row(std::size_t index) const;
  std::int32_t& word(std::size_t row, std::uint64_t offset) const;

  const CudaDriver& driver_;
  const DeviceContext& context_;
  const GpuProgramRecord& program_;
  const StreamRecord& record_;
  const ProgramBuffers& buffers_;
  const SharedMemory& shared_;
  CUstream step_stream_;
  ExpertCopies& copies_;
  ExpertCache* cache_;
  PinnedMemory rows_;
  std::vector<Layer> layers_;
  std::vector<Slot> slots_;
  std::int64_t computed_ = kNobody;  // the last wave that the copies behind need not wait for
  StreamStatistics statistics_;
  bool attached_ = false;
  std::int64_t tokens_ = 0;  // of the step; 0: none runs, or it streams nothing
};

}  // namespace hetcomp::gpu
