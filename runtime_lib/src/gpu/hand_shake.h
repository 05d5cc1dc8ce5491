// Hand-overs between the graphs on the GPUs and the CPU: flags in pinned memory that GPUs read and write by
// memory operations of their graphs. See docs/decisions/gpu-hand-shake.md.
#pragma once

#include <atomic>
#include <chrono>
#include <cstdint>
#include <functional>
#include <mutex>
#include <string>

#include "device_memory.h"

namespace hetcomp::gpu {

class HandShake {
 public:
  static constexpr std::uint32_t kRaised = 1;
  using Clock = std::chrono::steady_clock;
  // Of the graphs that are running: what is wrong with them, or empty. Called by a thread that waits, about
  // every millisecond.
  using Health = std::function<std::string()>;

  // patience: how long a wait may take before the step is given up. The context must be current.
  HandShake(const CudaDriver& driver, std::uint32_t flags, std::chrono::milliseconds patience, Health health);

  // For the CPU's threads, during a step. False: the step was given up, and nothing that is computed for it
  // matters.
  bool wait_for_gpu(std::uint32_t flag);
  void answer(std::uint32_t flag);
  // A flag to the CPU in the GPU's place: what waits for it on other streams goes on.
  void raise_to_cpu(std::uint32_t flag);
  bool aborted() const { return aborted_.load(std::memory_order_acquire); }

  // Gives the running step up: raises all flags that GPUs wait for, so that their graphs come to an end.
  // The first reason counts; without a running step nothing happens. Any thread may call it.
  void abort(const std::string& reason);

  // For whoever launches the graphs: before the launch, and when all GPUs have come to rest.
  void begin_step();
  void end_step();
  std::string abort_reason() const;

  // Addresses for the memory operations of a graph on the GPU whose context is current. A flag to a GPU is
  // raised by the CPU, or by another GPU.
  CUdeviceptr to_cpu_address(std::uint32_t flag) const { return memory_.address() + offset(flag); }
  CUdeviceptr to_gpu_address(std::uint32_t flag) const { return memory_.address() + offset(flags_ + flag); }

 private:
  // Two cache lines: x86 fetches them in pairs, and each flag has readers and writers of its own.
  static constexpr std::size_t kStride = 128;

  static std::size_t offset(std::size_t line) { return line * kStride; }
  std::atomic_ref<std::uint32_t> line(std::size_t index) const;
  bool wait_patiently(std::atomic_ref<std::uint32_t> flag, std::uint32_t index);

  std::uint32_t flags_;
  std::chrono::milliseconds patience_;
  Health health_;
  PinnedMemory memory_;  // flags to the CPU, then flags to GPUs
  std::atomic<bool> aborted_{false};
  mutable std::mutex mutex_;  // of what follows, and of raising flags
  bool running_ = false;
  std::string reason_;
};

}  // namespace hetcomp::gpu
