// Copies weights of linear layers from the host's memory to a GPU while it computes, in long steps of a
// prompt.
//
// All copies of a step are asked for before its graph is launched: each waits until the GPU has read what had
// its place in the ring, the GPU's kernels wait for it. See docs/decisions/weight-streaming.md.
#pragma once

#include <cstdint>
#include <functional>
#include <span>
#include <string>
#include <vector>

#include "device_context.h"
#include "expert_copies.h"
#include "program_buffers.h"
#include "program_record.h"
#include "shared_memory.h"

namespace hetcomp::gpu {

class WeightStream {
 public:
  // program: with a weight stream; all must outlive this. The context must be current when this is made, when
  // it ends, and for all calls but attach().
  WeightStream(const CudaDriver& driver, const DeviceContext& context, const GpuProgramRecord& program,
               const ProgramBuffers& buffers, const SharedMemory& shared);

  // See ExpertCopies: of copies from memory that is not pinned.
  void stage(std::function<void(const std::string&)> failed) { copies_.stage(std::move(failed)); }
  void unstage() { copies_.unstage(); }

  // The CPU's weights in the manifest's order, which must stay where they are, and whether they could be read
  // so far. Throws Error: a graph wants more of a weight than there is.
  void attach(std::span<const std::span<const std::uint8_t>> weights, std::function<bool()> good);

  // Before a graph is launched, which may stream weights or none.
  void begin(const GraphRecord& graph);
  // When the GPU is at rest, or was given up: when all copies are over. False: some of them failed.
  bool end() noexcept;

  ExpertCopies& copies() { return copies_; }
  std::uint64_t bytes() const { return bytes_; }  // copied since the last reset
  void reset_bytes() { bytes_ = 0; }

 private:
  const GpuProgramRecord& program_;
  const ProgramBuffers& buffers_;
  const SharedMemory& shared_;
  ExpertCopies copies_;
  std::vector<const std::uint8_t*> weights_;
  const GraphRecord* running_ = nullptr;
  std::uint64_t bytes_ = 0;
};

}  // namespace hetcomp::gpu
