// The CUDA graph of one batch size of a program.
#pragma once

#include <cstdint>
#include <map>
#include <optional>
#include <vector>

#include "device_memory.h"
#include "driver.h"
#include "gpu_times.h"
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
  // record must outlive this; budget: pays for the scratch memory of kernels. Throws Error. The context must
  // be current, as for all that follows.
  ProgramGraph(const GraphParts& parts, const GraphRecord& record, DeviceBudget& budget);

  CUgraphExec get() const { return exec_.get(); }
  // The same with events between its nodes, which takes longer; made when it is asked for first. Throws
  // Error.
  CUgraphExec timed();
  // Of timed(), when it has come to its end.
  void read_times(const EventClock& clock, std::vector<GpuEvent>& events) const;

 private:
  // One node of the graph: a node of the record, or two hand-overs.
  struct Step {
    std::size_t node;
    std::optional<std::size_t> second;
  };

  void take_scratch(DeviceBudget& budget);
  KernelLaunch launch_of(std::size_t index) const;
  CUgraphNode add(Graph& graph, const Step& step, const std::vector<CUgraphNode>& after) const;
  GraphExecHandle build(const std::vector<EventHandle>& events) const;
  GpuEvent run_of(std::size_t first, std::size_t last) const;

  GraphParts parts_;
  const GraphRecord& record_;
  std::vector<Step> steps_;                        // in order
  std::vector<DeviceMemory> scratch_;              // one a node, or one for all where no two run side by side
  std::map<std::size_t, CUdeviceptr> scratch_of_;  // by node of the record
  GraphExecHandle exec_;
  std::vector<std::size_t> places_;  // of timed(): the steps behind which an event is
  std::vector<EventHandle> events_;  // before all, and in those places
  GraphExecHandle timed_;
};

}  // namespace hetcomp::gpu
