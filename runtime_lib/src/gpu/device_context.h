// A GPU, and this process's use of it.
#pragma once

#include <cstdint>
#include <string>

#include "driver.h"

namespace hetcomp::gpu {

struct Device {
  // Throws Error if the driver shows no such device.
  Device(const CudaDriver& driver, int ordinal);

  std::string in_words() const { return name + " (GPU " + std::to_string(ordinal) + ")"; }

  int ordinal;  // as the driver counts
  CUdevice id = 0;
  std::string name;
  int compute_capability = 0;  // 90 is 9.0
  std::uint32_t shared_bytes_per_block = 0;
};

// The primary context of a device, which all users in the process share.
class DeviceContext {
 public:
  DeviceContext(const CudaDriver& driver, CUdevice device);
  ~DeviceContext() { driver_.context_release.raw(device_); }
  DeviceContext(const DeviceContext&) = delete;
  DeviceContext& operator=(const DeviceContext&) = delete;

  CUcontext get() const { return context_; }

 private:
  const CudaDriver& driver_;
  CUdevice device_;
  CUcontext context_ = nullptr;
};

// Makes a context the calling thread's for a while; every call but queries of devices needs one.
class CurrentContext {
 public:
  CurrentContext(const CudaDriver& driver, const DeviceContext& context) : driver_(driver) {
    driver_.context_push(context.get());
  }
  ~CurrentContext() {
    CUcontext popped = nullptr;
    driver_.context_pop.raw(&popped);
  }
  CurrentContext(const CurrentContext&) = delete;
  CurrentContext& operator=(const CurrentContext&) = delete;

 private:
  const CudaDriver& driver_;
};

// A stream that does not wait for the default stream, which other users of the context may fill.
StreamHandle create_stream(const CudaDriver& driver);
// One that has a time.
EventHandle create_event(const CudaDriver& driver);

}  // namespace hetcomp::gpu
