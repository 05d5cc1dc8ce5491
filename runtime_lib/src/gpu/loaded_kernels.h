// Kernels on a GPU, ready to be launched.
#pragma once

#include <filesystem>
#include <map>
#include <set>
#include <string>
#include <vector>

#include "device_context.h"
#include "driver.h"
#include "kernel_table.h"

namespace hetcomp::gpu {

struct LoadedKernel {
  KernelRecord record;
  CUfunction function;
};

// The context must be current when it is made and when it ends.
class LoadedKernels {
 public:
  // names: what a program calls; nothing else is loaded. Throws Error with the kernel's name.
  LoadedKernels(const CudaDriver& driver, const Device& device, const std::filesystem::path& artifact,
                const KernelsByName& kernels, const std::set<std::string>& names);

  const LoadedKernel& operator[](const std::string& name) const { return kernels_.at(name); }

 private:
  std::map<std::string, ModuleHandle> modules_;  // by file
  std::map<std::string, LoadedKernel> kernels_;
};

}  // namespace hetcomp::gpu
