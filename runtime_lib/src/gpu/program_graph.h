// The CUDA graph of one batch size of a program.
#pragma once

#include <cstdint>
#include <vector>

#include "device_memory.h"
#include "driver.h"
#include "graph.h"
#include "hand_shake.h"
#include "loaded_kernels.h"
#include "program_buffers.h"
#include "program_record.h"

namespace hetcomp::gpu {

// What the nodes of a graph refer to; all of it must outlive the graph.
struct GraphParts {
  const CudaDriver& driver;
  const DeviceContext& context;
  CUstream stream;
  const LoadedKernels& kernels;
  const ProgramBuffers& buffers;
  const HandShake& hand_shake;
};

class ProgramGraph {
 public:
  // budget: pays for the scratch memory of kernels. Throws Error. The context must be current.
  ProgramGraph(const GraphParts& parts, const GraphRecord& record, DeviceBudget& budget);

  CUgraphExec get() const { return exec_.get(); }

 private:
  KernelLaunch launch_of(const GraphParts& parts, const KernelNode& node, DeviceBudget& budget);

  std::vector<DeviceMemory> scratch_;  // one a node, or one for all where no two run side by side
  std::uint64_t shared_scratch_ = 0;   // its size in that case
  GraphExecHandle exec_;
};

}  // namespace hetcomp::gpu
