#include "driver.h"

#include <dlfcn.h>

#include "../status.h"

namespace hetcomp::gpu {
namespace {

std::string version_in_words(int version) {
  return std::to_string(version / 1000) + "." + std::to_string(version % 1000 / 10);
}

// Checked before any other entry point is looked up: an old driver lacks some of them.
int checked_version(const DriverLibrary& library) {
  const DriverCall<int*> get_version(library, "cuDriverGetVersion");
  int version = 0;
  get_version(&version);
  if (version >= CudaDriver::kOldestVersion) return version;
  throw Error(HETCOMP_MISSING_ISA, "The NVIDIA driver is for CUDA " + version_in_words(version) +
                                       ", hetcomp's GPU code needs CUDA " +
                                       version_in_words(CudaDriver::kOldestVersion) +
                                       " or newer: update the driver (525 or newer).");
}

}  // namespace

DriverLibrary::DriverLibrary(const std::string& name) : handle_(dlopen(name.c_str(), RTLD_NOW | RTLD_LOCAL)) {
  if (handle_ == nullptr) {
    const char* reason = dlerror();
    throw Error(HETCOMP_MISSING_ISA, "There is no NVIDIA driver (" +
                                         std::string(reason != nullptr ? reason : name) +
                                         "): install it, or compile the model for the CPU.");
  }
  error_string_ = reinterpret_cast<CUresult (*)(CUresult, const char**)>(dlsym(handle_, "cuGetErrorString"));
}

void* DriverLibrary::symbol(const char* name) const { return dlsym(handle_, name); }

std::string DriverLibrary::in_words(CUresult result) const {
  const char* text = nullptr;
  const bool known =
      error_string_ != nullptr && error_string_(result, &text) == CUDA_SUCCESS && text != nullptr;
  return std::string(known ? text : "unknown error") + " (CUDA error " + std::to_string(result) + ")";
}

void refuse_missing_entry(const char* symbol) {
  throw Error(HETCOMP_MISSING_ISA, "The NVIDIA driver lacks " + std::string(symbol) +
                                       ", which its version should have: install the driver anew.");
}

void report_failed_call(const char* symbol, const std::string& doing, const std::string& reason) {
  throw Error(HETCOMP_COMPUTE, "The GPU driver's " + std::string(symbol) + " failed" +
                                   (doing.empty() ? "" : " when " + doing) + ": " + reason +
                                   "; nvidia-smi shows the state of the GPU and who uses it.");
}

CudaDriver::CudaDriver(const std::string& library) : library_(library), version_(checked_version(library_)) {
  const CUresult result = init.raw(0);
  int devices = 0;
  if (result == CUDA_SUCCESS) device_count(&devices);
  if (result == CUDA_ERROR_NO_DEVICE || (result == CUDA_SUCCESS && devices == 0)) {
    throw Error(
        HETCOMP_MISSING_ISA,
        "The NVIDIA driver shows no GPU: check CUDA_VISIBLE_DEVICES and nvidia-smi, or compile the model for "
        "the CPU.");
  }
  init.require(result);
}

}  // namespace hetcomp::gpu
