// The GPU's part of a model: gpu/ of an artifact, loaded, with one graph a batch size.
#pragma once

#include <chrono>
#include <cstdint>
#include <filesystem>
#include <functional>
#include <map>
#include <memory>
#include <span>
#include <string>

#include "device_context.h"
#include "expert_stream.h"
#include "hand_shake.h"
#include "program_buffers.h"
#include "program_record.h"

namespace hetcomp::gpu {

struct GpuOptions {
  int device = 0;
  bool verify = true;  // the hashes of weights; code is always checked
  // How long GPU and CPU wait for each other before a step is given up, and then for the GPU to come to rest.
  std::chrono::milliseconds patience{30'000};
  std::chrono::milliseconds drain{5'000};
};

class GpuProgram {
 public:
  // Throws Error with what is wrong and what to do: the driver's, the device's, the artifact's fault.
  GpuProgram(const CudaDriver& driver, const std::filesystem::path& artifact, const GpuOptions& options);
  // Raises all flags of a graph that still runs. Memory is left behind if the GPU does not come to rest then,
  // for the driver would wait for ever.
  ~GpuProgram();
  GpuProgram(const GpuProgram&) = delete;
  GpuProgram& operator=(const GpuProgram&) = delete;

  // Lets experts be copied from the CPU's weights, where the program streams some; what ExpertStream::attach
  // returns.
  std::string attach(const HostWeights& weights);
  // Fills the slots of cached experts, where the program has some; the CPU's weights are pinned if they are
  // attached. Throws Error.
  void fill_cache(const HostWeights& weights);
  bool streams() const { return record_.stream.has_value(); }
  // Null where nothing is streamed, or cached.
  ExpertStream* expert_stream() const;
  ExpertCache* expert_cache() const;

  // One step of so many tokens (that only matters where experts are streamed or cached; copies: false where
  // nothing may be copied for this step, though its graph would wait for it): sends the step
  // buffers, launches the graph, calls cpu_work on this thread (it waits for the GPU and answers), and
  // returns when the GPU is at rest. One thread at a time. Throws Error: no graph of that batch size, the GPU
  // or the CPU does not answer in time, a fault of the GPU; what cpu_work throws is passed on. The GPU is at
  // rest then and the next step may run, but state buffers hold what the step has written; only after a fault
  // of the GPU itself every further call says so, until the model is loaded anew.
  void run(std::int32_t batch, const std::function<void(HandShake&)>& cpu_work, std::int64_t tokens = 1,
           bool copies = true);

  // Before a step that reads and writes the cache below these positions, by slot. Throws Error.
  void provide_cache(const std::map<std::int32_t, std::int64_t>& positions, const KvPool& pool);

  // From any thread: gives the running step up.
  void abort(const std::string& reason);

  // The host's side of a step, pinned_in or pinned_out buffer, to be read and written between steps or, as
  // hand-overs allow, during one. Throws Error for any other name.
  std::span<std::byte> host(const std::string& buffer) const;

  const GpuProgramRecord& record() const { return record_; }
  // Copies the beginning of a result buffer, between steps. Throws Error for any other name.
  void fetch(const std::string& buffer, std::span<std::byte> to) const;

  const Device& device() const { return device_; }
  std::uint64_t device_bytes() const;  // taken of the plan's figure

 private:
  struct Resources;

  std::string health() const;
  void wait_for_end();
  void drain();
  void note_failure(CUresult result);

  const CudaDriver& driver_;
  GpuOptions options_;
  Device device_;
  GpuProgramRecord record_;
  std::string broken_;  // why no step can run any more
  std::unique_ptr<DeviceContext> context_;
  std::unique_ptr<Resources> resources_;
};

}  // namespace hetcomp::gpu
