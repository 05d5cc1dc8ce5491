// Memory of the host that the CPU and all GPUs of a step reach: the flags of their hand-overs, the buffers
// that carry what is handed over, and the CPU's weights, where experts are copied from them.
#pragma once

#include <chrono>
#include <map>
#include <memory>
#include <span>
#include <string>
#include <vector>

#include "device_memory.h"
#include "hand_shake.h"
#include "program_record.h"

namespace hetcomp::gpu {

class SharedMemory {
 public:
  // The pinned buffers of all `programs`, which have as many hand-overs each; those of one name are one
  // buffer. context: of any of the GPUs, which must outlive it. Throws Error: two programs do not agree on a
  // buffer.
  SharedMemory(const CudaDriver& driver, const DeviceContext& context,
               std::span<const GpuProgramRecord* const> programs, std::chrono::milliseconds patience,
               HandShake::Health health);
  ~SharedMemory();
  SharedMemory(const SharedMemory&) = delete;
  SharedMemory& operator=(const SharedMemory&) = delete;

  HandShake& hand_shake() const { return pinned_->hand_shake; }

  // Pins memory that is somebody else's as long as this lives. Returns why the system refuses, or "": then
  // all of it is pinned.
  std::string pin(std::span<const std::span<const std::uint8_t>> regions);

  // By hand-over: 1 where the CPU has nothing to compute in the running step.
  std::span<std::uint8_t> skip() const { return pinned_->skip; }

  // The buffer as the CPU sees it, 256-byte aligned. Throws Error if there is none of that name.
  std::span<std::byte> host(const std::string& buffer) const;
  // As the GPU does whose context is current.
  CUdeviceptr address(const std::string& buffer) const;

 private:
  struct Piece {
    std::uint64_t offset;
    std::uint64_t bytes;
  };

  struct Pinned {  // what needs a context current when it is made and when it ends
    PinnedMemory buffers;
    HandShake hand_shake;
    std::vector<std::uint8_t> skip;
    std::vector<PinnedRegion> regions;
  };

  const Piece& piece(const std::string& buffer) const;

  const CudaDriver& driver_;
  const DeviceContext& context_;
  std::map<std::string, Piece> pieces_;
  std::unique_ptr<Pinned> pinned_;
};

}  // namespace hetcomp::gpu
