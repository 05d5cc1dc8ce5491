// Copies experts from the host's memory to the GPU while it computes, in steps of a prompt.
//
// A layer's copies begin when the routing of the layer before is known, with those experts that are likely to
// be needed, and end when its own is known; the rest is the CPU's. Two halves of slots take turns: when the
// CPU gets a layer's routing, the GPU is done with the layer before it.
#pragma once

#include <cstddef>
#include <cstdint>
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
  // program: with a stream; cache: null, or what holds experts that need not be copied; all must outlive
  // this. The context must be current when this is made, when it ends and during begin() and end().
  ExpertStream(const CudaDriver& driver, const DeviceContext& context, const GpuProgramRecord& program,
               const ProgramBuffers& buffers, const SharedMemory& shared, CUstream step_stream,
               ExpertCopies& copies, const ExpertCache* cache);

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
  // When the GPU is at rest. Without a begin() nothing happens.
  void end() noexcept;

  const StreamStatistics& statistics() const { return statistics_; }
  void reset_statistics() { statistics_ = {}; }

 private:
  struct Operand {
    CUdeviceptr slots;
    std::uint64_t expert_bytes;
    ExpertAddresses sources;
  };
  struct Layer {
    std::vector<Operand> operands;
    std::vector<std::int32_t> cpu_experts;  // ascending
    std::vector<std::int32_t> streamable;   // in this step: of them those that the GPU has not got
    std::vector<std::int32_t> order;        // in this step: the one in slot 0, in slot 1, ..
    std::size_t copied = 0;                 // of them, so far
    bool asked = true;                      // whether the CPU gets the layer's input
    std::uint64_t expert_bytes = 0;         // of all operands
  };

  std::size_t expect(std::size_t index);
  std::span<std::int32_t> choices(const StreamLayer& record) const;
  std::size_t decide(std::size_t index, const std::vector<std::int32_t>& count);
  std::size_t split(const Layer& layer, std::span<const std::int32_t> tokens, const StreamLayer& record,
                    double resident_us) const;
  void copy(Layer& layer, std::size_t to);
  void leave_to_cpu(std::size_t index, std::span<std::int32_t> ids, std::size_t streamed);
  BufferAddress place_of(std::size_t row) const;
  void send_with_step(std::size_t rows);
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
  const ExpertCache* cache_;
  PinnedMemory rows_;
  std::vector<Layer> layers_;
  StreamStatistics statistics_;
  bool attached_ = false;
  std::int64_t tokens_ = 0;  // of the step; 0: none runs, or it streams nothing
};

}  // namespace hetcomp::gpu
