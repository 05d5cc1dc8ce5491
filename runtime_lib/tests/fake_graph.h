// Graphs of the fake driver: kernels and memory operations in the order of their dependencies.
#pragma once

#include <atomic>
#include <chrono>
#include <cstdint>
#include <functional>
#include <thread>
#include <vector>

#include "cuda_api.h"
#include "fake_cuda.h"

namespace fake_graph {

struct Node {
  std::function<CUresult()> kernel;
  std::vector<CUstreamBatchMemOpParams> operations;
  std::vector<std::size_t> after;
};
using Nodes = std::vector<Node>;

inline std::atomic_ref<std::uint32_t> flag_of(const CUstreamBatchMemOpParams& operation) {
  return std::atomic_ref(*reinterpret_cast<std::uint32_t*>(operation.writeValue.address));
}

// Does the next operations of a node that are possible; true when it has done all.
inline bool operate(const Node& node, std::size_t& done) {
  for (; done < node.operations.size(); ++done) {
    const CUstreamBatchMemOpParams& operation = node.operations[done];
    const auto value = static_cast<std::uint32_t>(operation.writeValue.value);
    const std::atomic_ref<std::uint32_t> flag = flag_of(operation);
    if (operation.operation == CU_STREAM_MEM_OP_WRITE_VALUE_32)
      flag.store(value, std::memory_order_release);
    else if (static_cast<std::int32_t>(flag.load(std::memory_order_acquire) - value) < 0)
      return false;
  }
  return true;
}

inline CUresult run_graph(const Nodes& nodes, const FakeCuda& fake) {
  std::vector<bool> ended(nodes.size());
  std::vector<std::size_t> operations_done(nodes.size());
  for (std::size_t left = nodes.size(); left > 0;) {
    bool progress = false;
    for (std::size_t k = 0; k < nodes.size(); ++k) {
      const std::size_t i = fake.reverse ? nodes.size() - 1 - k : k;
      bool ready = !ended[i];
      for (const std::size_t before : nodes[i].after) ready = ready && ended[before];
      if (!ready) continue;
      if (nodes[i].kernel) {
        while (fake.hang) std::this_thread::sleep_for(std::chrono::milliseconds(1));
        const CUresult result = nodes[i].kernel();
        if (static_cast<int>(result) == kFakeGraphEnds) return CUDA_SUCCESS;
        if (result != CUDA_SUCCESS) return result;
      } else if (!operate(nodes[i], operations_done[i])) {
        continue;
      }
      ended[i] = true;
      progress = true;
      --left;
      if (fake.reverse) break;
    }
    if (!progress) std::this_thread::yield();
  }
  return CUDA_SUCCESS;
}

}  // namespace fake_graph
