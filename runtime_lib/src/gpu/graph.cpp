#include "graph.h"

#include "../status.h"

namespace hetcomp::gpu {

CUDA_KERNEL_NODE_PARAMS KernelLaunch::parameters() {
  pointers_.clear();
  for (std::uint64_t& value : values_) pointers_.push_back(&value);
  CUDA_KERNEL_NODE_PARAMS parameters{};
  parameters.func = kernel_.function;
  parameters.gridDimX = grid_[0];
  parameters.gridDimY = grid_[1];
  parameters.gridDimZ = grid_[2];
  parameters.blockDimX = 32 * kernel_.record.num_warps;
  parameters.blockDimY = parameters.blockDimZ = 1;
  parameters.sharedMemBytes = kernel_.record.shared_bytes;
  parameters.kernelParams = pointers_.data();
  return parameters;
}

Graph::Graph(const CudaDriver& driver) : driver_(driver) {
  CUgraph graph = nullptr;
  driver.graph_create(&graph, 0);
  handle_ = GraphHandle(driver, graph);
}

CUgraphNode Graph::add_kernel(KernelLaunch& launch, const std::vector<CUgraphNode>& after) {
  const CUDA_KERNEL_NODE_PARAMS parameters = launch.parameters();
  CUgraphNode node = nullptr;
  driver_.graph_add_kernel(&node, handle_.get(), after.data(), after.size(), &parameters);
  return node;
}

CUgraphNode Graph::add_memory_operations(CUcontext context, std::vector<CUstreamBatchMemOpParams> operations,
                                         const std::vector<CUgraphNode>& after) {
  CUDA_BATCH_MEM_OP_NODE_PARAMS parameters{};
  parameters.ctx = context;
  parameters.count = static_cast<unsigned>(operations.size());
  parameters.paramArray = operations.data();
  CUgraphNode node = nullptr;
  // No attribute of the device tells: the one of that name is about the interface before CUDA 12.
  const CUresult result = driver_.graph_add_memory_operations
                              ? driver_.graph_add_memory_operations.raw(&node, handle_.get(), after.data(),
                                                                        after.size(), &parameters)
                              : CUDA_ERROR_NOT_SUPPORTED;
  if (result == CUDA_ERROR_NOT_SUPPORTED) {
    throw Error(
        HETCOMP_MISSING_ISA,
        "This GPU or its driver has no memory operations in graphs (cuGraphAddBatchMemOpNode), by which GPU "
        "and "
        "CPU hand over to each other: update the driver, or compile the model for the GPU or the CPU alone.");
  }
  driver_.graph_add_memory_operations.require(result);
  return node;
}

CUgraphNode Graph::add_event(CUevent event, const std::vector<CUgraphNode>& after) {
  CUgraphNode node = nullptr;
  driver_.graph_add_event(&node, handle_.get(), after.data(), after.size(), event);
  return node;
}

GraphExecHandle Graph::instantiate() const {
  CUgraphExec exec = nullptr;
  driver_.graph_instantiate(&exec, handle_.get(), 0);
  return {driver_, exec};
}

CUstreamBatchMemOpParams raise_flag(CUdeviceptr address) {
  CUstreamBatchMemOpParams operation{};
  // The default has a barrier: what kernels wrote before is visible to the CPU when the flag is.
  operation.writeValue = {CU_STREAM_MEM_OP_WRITE_VALUE_32, address, HandShake::kRaised,
                          CU_STREAM_WRITE_VALUE_DEFAULT, 0};
  return operation;
}

CUstreamBatchMemOpParams await_flag(CUdeviceptr address) {
  CUstreamBatchMemOpParams operation{};
  operation.waitValue = {CU_STREAM_MEM_OP_WAIT_VALUE_32, address, HandShake::kRaised,
                         CU_STREAM_WAIT_VALUE_GEQ, 0};
  return operation;
}

}  // namespace hetcomp::gpu
