#include "shared_memory.h"

#include <algorithm>

#include "../status.h"

namespace hetcomp::gpu {

SharedMemory::SharedMemory(const CudaDriver& driver, const DeviceContext& context,
                           std::span<const GpuProgramRecord* const> programs,
                           std::chrono::milliseconds patience, HandShake::Health health)
    : driver_(driver), context_(context) {
  std::uint64_t end = 0;
  std::uint32_t flags = 0;
  for (const GpuProgramRecord* program : programs) {
    flags = std::max(flags, program->all_flags());
    for (const BufferRecord& buffer : program->buffers) {
      if (!is_pinned(buffer.kind)) continue;
      const auto [place, is_new] = pieces_.emplace(buffer.name, Piece{end, buffer.bytes});
      if (!is_new && place->second.bytes != buffer.bytes)
        throw Error(HETCOMP_BAD_ARTIFACT, "The GPU programs do not agree on the size of the buffer " +
                                              buffer.name + ": compile the model again.");
      if (is_new) end += allocated(buffer.bytes);
      if (end > GpuProgramRecord::kMostBytes)
        throw Error(HETCOMP_OUT_OF_MEMORY,
                    "The buffers between CPU and GPUs are larger than the address space.");
    }
  }
  const CurrentContext current(driver, context);
  pinned_ = std::unique_ptr<Pinned>(new Pinned{
      end == 0 ? PinnedMemory() : PinnedMemory(driver, end, "what CPU and GPUs hand to each other"),
      HandShake(driver, flags, patience, std::move(health)),
      std::vector<std::uint8_t>(programs.front()->flags),
      {}});
}

SharedMemory::~SharedMemory() {
  try {
    const CurrentContext current(driver_, context_);
    pinned_.reset();
  } catch (const Error&) {
    // The context can no longer be entered: the driver has dropped all that was in it.
  }
}

std::string SharedMemory::pin(std::span<const std::span<const std::uint8_t>> regions) {
  const CurrentContext current(driver_, context_);
  for (const std::span<const std::uint8_t> region : regions) {
    std::string reason = pinned_->regions.emplace_back(driver_).pin(region);
    if (reason.empty()) continue;
    pinned_->regions.clear();
    return reason;
  }
  return {};
}

const SharedMemory::Piece& SharedMemory::piece(const std::string& buffer) const {
  const auto found = pieces_.find(buffer);
  if (found == pieces_.end())
    throw Error(HETCOMP_INVALID_ARGUMENT, "The GPU programs have no pinned buffer " + buffer + ".");
  return found->second;
}

std::span<std::byte> SharedMemory::host(const std::string& buffer) const {
  const Piece& found = piece(buffer);
  return pinned_->buffers.bytes().subspan(found.offset, found.bytes);
}

CUdeviceptr SharedMemory::address(const std::string& buffer) const {
  return pinned_->buffers.address() + piece(buffer).offset;
}

}  // namespace hetcomp::gpu
