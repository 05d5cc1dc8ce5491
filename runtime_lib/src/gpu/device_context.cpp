#include "device_context.h"

#include <array>

#include "../status.h"

namespace hetcomp::gpu {

Device::Device(const CudaDriver& driver, int ordinal) : ordinal(ordinal) {
  int devices = 0;
  driver.device_count(&devices);
  if (ordinal < 0 || ordinal >= devices) {
    throw Error(HETCOMP_MISSING_ISA, "There is no GPU " + std::to_string(ordinal) + ": the driver shows " +
                                         std::to_string(devices) +
                                         ", counted from 0: give the number of one of them (--gpu).");
  }
  driver.device_get(&id, ordinal);
  std::array<char, 256> text{};
  driver.device_name(text.data(), static_cast<int>(text.size() - 1), id);
  name = text.data();
  const auto attribute = [&](CUdevice_attribute which) {
    int value = 0;
    driver.device_attribute(&value, which, id);
    return value;
  };
  compute_capability = 10 * attribute(CU_DEVICE_ATTRIBUTE_COMPUTE_CAPABILITY_MAJOR) +
                       attribute(CU_DEVICE_ATTRIBUTE_COMPUTE_CAPABILITY_MINOR);
  shared_bytes_per_block =
      static_cast<std::uint32_t>(attribute(CU_DEVICE_ATTRIBUTE_MAX_SHARED_MEMORY_PER_BLOCK_OPTIN));
}

DeviceContext::DeviceContext(const CudaDriver& driver, CUdevice device) : driver_(driver), device_(device) {
  driver.context_retain(&context_, device);
}

StreamHandle create_stream(const CudaDriver& driver) {
  CUstream stream = nullptr;
  driver.stream_create(&stream, CU_STREAM_NON_BLOCKING);
  return {driver, stream};
}

EventHandle create_event(const CudaDriver& driver) {
  CUevent event = nullptr;
  driver.event_create(&event, CU_EVENT_DEFAULT);
  return {driver, event};
}

}  // namespace hetcomp::gpu
