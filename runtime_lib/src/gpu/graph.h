// A CUDA graph built from explicit nodes.
#pragma once

#include <array>
#include <bit>
#include <vector>

#include "driver.h"
#include "hand_shake.h"
#include "loaded_kernels.h"
#include "program_record.h"

namespace hetcomp::gpu {

// A launch of a kernel with all its arguments as bytes.
class KernelLaunch {
 public:
  KernelLaunch(const LoadedKernel& kernel, const std::array<std::uint32_t, 3>& grid)
      : kernel_(kernel), grid_(grid) {}

  void add_pointer(CUdeviceptr value) { values_.push_back(value); }
  void add_int32(std::int32_t value) { values_.push_back(static_cast<std::uint32_t>(value)); }
  void add_int64(std::int64_t value) { values_.push_back(static_cast<std::uint64_t>(value)); }
  void add_float32(float value) { values_.push_back(std::bit_cast<std::uint32_t>(value)); }

  // Of a node; pointers into this object, which must outlive the use.
  CUDA_KERNEL_NODE_PARAMS parameters();

 private:
  const LoadedKernel& kernel_;
  std::array<std::uint32_t, 3> grid_;
  std::vector<std::uint64_t> values_;  // the driver reads the low bytes, as many as the argument has
  std::vector<void*> pointers_;
};

// The context must be current when it is made and when it ends.
class Graph {
 public:
  explicit Graph(const CudaDriver& driver);

  CUgraphNode add_kernel(KernelLaunch& launch, const std::vector<CUgraphNode>& after);
  // Throws Error(HETCOMP_MISSING_ISA) if the driver or the device has no such nodes.
  CUgraphNode add_memory_operations(CUcontext context, std::vector<CUstreamBatchMemOpParams> operations,
                                    const std::vector<CUgraphNode>& after);
  CUgraphNode add_event(CUevent event, const std::vector<CUgraphNode>& after);
  GraphExecHandle instantiate() const;

 private:
  const CudaDriver& driver_;
  GraphHandle handle_;
};

CUstreamBatchMemOpParams raise_flag(CUdeviceptr address);
CUstreamBatchMemOpParams await_flag(CUdeviceptr address);

}  // namespace hetcomp::gpu
