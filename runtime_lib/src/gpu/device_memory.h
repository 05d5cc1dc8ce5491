// Memory of a GPU within a plan's figure, and memory of the host that the GPU can reach.
#pragma once

#include <cstddef>
#include <cstdint>
#include <span>
#include <string>
#include <utility>

#include "device_context.h"
#include "driver.h"

namespace hetcomp::gpu {

// What an allocation of `bytes` takes: as cuMemAlloc gives it, from an address that suits any kernel.
constexpr std::uint64_t allocated(std::uint64_t bytes) { return (bytes + 255) / 256 * 256; }

// The bytes of device memory that a plan gives to a program. What was taken is not given back: all memory
// lives as long as the program.
class DeviceBudget {
 public:
  // device: in words.
  DeviceBudget(std::uint64_t bytes, std::string device) : limit_(bytes), device_(std::move(device)) {}
  // Throws Error(HETCOMP_BAD_ARTIFACT): a program that needs more than its plan says was not written by us.
  void take(std::uint64_t bytes, const std::string& purpose);
  std::uint64_t taken() const { return taken_; }
  std::uint64_t limit() const { return limit_; }
  const std::string& device() const { return device_; }

 private:
  std::uint64_t limit_;
  std::string device_;
  std::uint64_t taken_ = 0;
};

// Throws Error(HETCOMP_OUT_OF_MEMORY) if the device has less than the budget left, with what others use. The
// context must be current.
void require_free_memory(const CudaDriver& driver, const DeviceBudget& budget);

// Zeroed (when the stream gets there), aligned to at least 256 bytes. The context must be current when it is
// made and when it ends; so it is with all of this file.
class DeviceMemory {
 public:
  DeviceMemory() = default;
  DeviceMemory(const CudaDriver& driver, DeviceBudget& budget, CUstream stream, std::uint64_t bytes,
               const std::string& purpose);

  CUdeviceptr address() const { return handle_.get(); }

 private:
  MemoryHandle handle_;
};

// Zeroed memory of the host, pinned, which all GPUs of this process reach.
class PinnedMemory {
 public:
  PinnedMemory() = default;
  PinnedMemory(const CudaDriver& driver, std::size_t bytes, const std::string& purpose);

  std::span<std::byte> bytes() const { return {static_cast<std::byte*>(handle_.get()), size_}; }
  // As the GPU sees it whose context is current.
  CUdeviceptr address() const;

 private:
  const CudaDriver* driver_ = nullptr;
  HostMemoryHandle handle_;
  std::size_t size_ = 0;
};

// Memory of the host that is somebody else's, pinned for all GPUs of this process as long as this lives.
class PinnedRegion {
 public:
  explicit PinnedRegion(const CudaDriver& driver) : driver_(&driver) {}
  // Memory of this process, or a shared mapping of a file that is only read. Returns why the system refuses,
  // or "".
  std::string pin(std::span<const std::uint8_t> memory);

 private:
  const CudaDriver* driver_;
  HostPinHandle handle_;
};

}  // namespace hetcomp::gpu
