#include "loaded_kernels.h"

#include "../status.h"
#include "cubin.h"

namespace hetcomp::gpu {
namespace {

// From here on a function must be told that it may use so much (CUDA C++ Programming Guide, "Shared Memory").
constexpr std::uint32_t kSharedBytesOfAll = 48U << 10;

ModuleHandle load_module(const CudaDriver& driver, const Device& device,
                         const std::filesystem::path& artifact, const KernelRecord& kernel) {
  const std::vector<std::byte> code = read_cubin(artifact, kernel);
  CUmodule module = nullptr;
  const CUresult result = driver.module_load.raw(&module, code.data());
  if (result == CUDA_ERROR_NO_BINARY_FOR_GPU || result == CUDA_ERROR_INVALID_IMAGE) {
    throw Error(HETCOMP_MISSING_ISA, "The GPU code " + kernel.file + " does not load on " +
                                         device.in_words() + ": " + driver.in_words(result) +
                                         "; update the driver, or compile the model with --cc " +
                                         std::to_string(device.compute_capability) + ".");
  }
  driver.module_load.require(result, "loading " + kernel.file);
  return {driver, module};
}

}  // namespace

LoadedKernels::LoadedKernels(const CudaDriver& driver, const Device& device,
                             const std::filesystem::path& artifact, const KernelsByName& kernels,
                             const std::set<std::string>& names) {
  for (const std::string& name : names) {
    const KernelRecord& kernel = kernels.at(name);
    if (kernel.shared_bytes > device.shared_bytes_per_block) {
      throw Error(HETCOMP_MISSING_ISA,
                  "The GPU kernel " + name + " needs " + std::to_string(kernel.shared_bytes) +
                      " bytes of shared memory, " + device.in_words() + " gives a block " +
                      std::to_string(device.shared_bytes_per_block) + ": compile the model with --cc " +
                      std::to_string(device.compute_capability) + ".");
    }
    auto module = modules_.find(kernel.file);
    if (module == modules_.end())
      module = modules_.emplace(kernel.file, load_module(driver, device, artifact, kernel)).first;
    CUfunction function = nullptr;
    const CUresult result = driver.module_function.raw(&function, module->second.get(), kernel.entry.c_str());
    if (result == CUDA_ERROR_NOT_FOUND) {
      throw Error(HETCOMP_BAD_ARTIFACT, "The GPU code " + kernel.file + " has no " + kernel.entry +
                                            ", which kernels.json names: compile the model again.");
    }
    driver.module_function.require(result, "looking up " + kernel.entry);
    if (kernel.shared_bytes > kSharedBytesOfAll) {
      driver.function_set(function, CU_FUNC_ATTRIBUTE_MAX_DYNAMIC_SHARED_SIZE_BYTES,
                          static_cast<int>(kernel.shared_bytes));
    }
    kernels_.emplace(name, LoadedKernel{kernel, function});
  }
}

}  // namespace hetcomp::gpu
