#include "device_memory.h"

#include <cstring>

#include "../status.h"

namespace hetcomp::gpu {

void DeviceBudget::take(std::uint64_t bytes, const std::string& purpose) {
  if (bytes > limit_ - taken_) {
    throw Error(HETCOMP_BAD_ARTIFACT, purpose + " takes " + in_words(bytes) + " of the memory of " + device_ +
                                          ", the plan has " + in_words(limit_ - taken_) + " of its " +
                                          in_words(limit_) + " left for it: compile the model again.");
  }
  taken_ += bytes;
}

void require_free_memory(const CudaDriver& driver, const DeviceBudget& budget) {
  std::size_t free = 0;
  std::size_t total = 0;
  driver.memory_info(&free, &total);
  if (budget.limit() <= free) return;
  throw Error(
      HETCOMP_OUT_OF_MEMORY,
      "The plan needs " + in_words(budget.limit()) + " of GPU memory, " + budget.device() + " has " +
          in_words(free) + " free; " + in_words(total - free) + " of its " + in_words(total) +
          " are in use (nvidia-smi names the processes): end them, or compile the model with a smaller "
          "--vram.");
}

DeviceMemory::DeviceMemory(const CudaDriver& driver, DeviceBudget& budget, CUstream stream,
                           std::uint64_t bytes, const std::string& purpose) {
  budget.take(bytes, purpose);
  CUdeviceptr address = 0;
  const CUresult result = driver.memory_allocate.raw(&address, bytes);
  if (result == CUDA_ERROR_OUT_OF_MEMORY) {
    throw Error(HETCOMP_OUT_OF_MEMORY,
                budget.device() + " has no " + in_words(bytes) + " left for " + purpose +
                    ": another process has taken memory since the check; end it, or compile "
                    "the model with a smaller --vram.");
  }
  driver.memory_allocate.require(result, "allocating " + purpose);
  handle_ = MemoryHandle(driver, address);
  driver.memory_set(address, 0, bytes, stream);
}

PinnedMemory::PinnedMemory(const CudaDriver& driver, std::size_t bytes, const std::string& purpose)
    : driver_(&driver), size_(bytes) {
  void* memory = nullptr;
  const CUresult result =
      driver.host_allocate.raw(&memory, bytes, CU_MEMHOSTALLOC_DEVICEMAP | CU_MEMHOSTALLOC_PORTABLE);
  if (result == CUDA_ERROR_OUT_OF_MEMORY) {
    throw Error(HETCOMP_OUT_OF_MEMORY, "The system refuses " + in_words(bytes) + " of pinned memory for " +
                                           purpose + ": free memory, or raise its limit of the cgroup.");
  }
  driver.host_allocate.require(result, "allocating " + purpose);
  handle_ = HostMemoryHandle(driver, memory);
  std::memset(memory, 0, bytes);
}

CUdeviceptr PinnedMemory::address() const {
  CUdeviceptr address = 0;
  driver_->host_device_pointer(&address, handle_.get(), 0);
  return address;
}

std::string PinnedRegion::pin(std::span<const std::uint8_t> memory) {
  if (memory.empty()) return {};
  auto* const address = const_cast<std::uint8_t*>(memory.data());
  CUresult result = driver_->host_register.raw(address, memory.size(), CU_MEMHOSTREGISTER_PORTABLE);
  // What cannot be written must say so.
  if (result == CUDA_ERROR_INVALID_VALUE)
    result = driver_->host_register.raw(address, memory.size(),
                                        CU_MEMHOSTREGISTER_PORTABLE | CU_MEMHOSTREGISTER_READ_ONLY);
  if (result != CUDA_SUCCESS) return driver_->in_words(result);
  handle_ = HostPinHandle(*driver_, address);
  return {};
}

}  // namespace hetcomp::gpu
