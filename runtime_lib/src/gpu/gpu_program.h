// One GPU's part of a model, loaded: its program of gpu/, with one graph a batch size.
#pragma once

#include <cstdint>
#include <filesystem>
#include <map>
#include <memory>
#include <span>
#include <string>
#include <vector>

#include "device_context.h"
#include "expert_stream.h"
#include "gpu_times.h"
#include "host_weights.h"
#include "program_record.h"
#include "shared_memory.h"
#include "weight_stream.h"

namespace hetcomp::gpu {

// What an artifact has for a GPU, checked against it; nothing is loaded yet.
struct ProgramFiles {
  // file: the program's, in the artifact. ordinal: the GPU's number as the driver counts. Throws Error with
  // what is wrong and what to do: the device's, the artifact's fault.
  ProgramFiles(const CudaDriver& driver, const std::filesystem::path& artifact, const std::string& file,
               int ordinal);

  Device device;
  KernelsByName kernels;
  GpuProgramRecord record;
};

class GpuProgram {
 public:
  enum class State { kRunning, kAtRest, kFailed };

  // context: of files.device; it and `shared` must outlive the program. verify: the hashes of weights; code
  // is always checked. Throws Error.
  GpuProgram(const CudaDriver& driver, const std::filesystem::path& artifact, const ProgramFiles& files,
             const DeviceContext& context, const SharedMemory& shared, bool verify);
  // The GPU must be at rest, for the driver would wait for ever.
  ~GpuProgram();
  GpuProgram(const GpuProgram&) = delete;
  GpuProgram& operator=(const GpuProgram&) = delete;

  // Where the program streams anything: it is copied through pinned memory from now on, or no longer; see
  // ExpertCopies. Throws Error.
  void stage();
  void unstage();
  // Lets experts and weights be copied from the CPU's weights, where the program streams some; see the
  // streams' attach().
  void attach(const HostWeights& weights);
  // Fills the slots of cached experts from the CPU's weights, where the program has some; they may change
  // places if the weights are attached. Throws Error.
  void fill_cache(const HostWeights& weights);
  // Null where nothing is streamed, or cached.
  ExpertStream* expert_stream() const;
  WeightStream* weight_stream() const;
  ExpertCache* expert_cache() const;

  // Throws Error(HETCOMP_INVALID_ARGUMENT) if there is no graph of that batch size.
  void require_graph(std::int32_t batch, bool adapted) const;
  const GraphRecord& graph(std::int32_t batch, bool adapted) const;
  // Sends the step buffers and launches the graph, for a step of so many tokens: that only matters where
  // experts are streamed or cached. may_stream: false where no experts may be streamed in it. Throws Error.
  void launch(std::int32_t batch, bool adapted, std::int64_t tokens, bool may_stream);
  // See AdapterMemory::put; of a program with room for adapters.
  void put_adapter(std::int32_t slot, std::uint64_t begin, std::span<const GpuPair> pairs) const;
  // While the CPU waits for a GPU: asks for the next copy to the cache, if there is one. Throws Error.
  void copy_next() const;
  // When the CPU has done its part of a step: what the next one waits for is done under the GPU's end. Throws
  // Error.
  void look_ahead() const;
  // Behind every step, when the GPU is at rest.
  void end_step() noexcept;
  // Whether steps take the times of what the GPU does from the next one on, which makes them longer.
  void set_timed(bool timed) { timed_ = timed; }
  // Of the last step, when the GPU is at rest; empty where it took none. Throws Error.
  std::vector<GpuEvent> read_times() const;
  // Of what was launched. Any thread may ask.
  State state() const { return state_of(query()); }
  // Why the GPU failed, in the driver's words.
  std::string failure() const { return driver_.in_words(query()); }

  // Before a step that reads and writes the cache below these positions, by slot. Throws Error.
  void provide_cache(const std::map<std::int32_t, std::int64_t>& positions, const KvPool& pool);

  // Why no step can run any more; empty while one can.
  const std::string& broken() const { return broken_; }
  void set_broken(const std::string& reason) { broken_ = reason; }

  // The host's side of a step buffer, to be written between steps. Throws Error for any other name.
  std::span<std::byte> host(const std::string& buffer) const;
  // Copies the beginning of a result buffer, between steps. Throws Error for any other name.
  void fetch(const std::string& buffer, std::span<std::byte> to) const;

  // Of a sequence's recurrences here, and copies of them, between steps. to, from: [recurrent_bytes()]. Throw
  // Error.
  std::size_t recurrent_bytes() const;
  void save_recurrent(std::int32_t slot, std::span<std::byte> to) const;
  void restore_recurrent(std::int32_t slot, std::span<const std::byte> from) const;

  const GpuProgramRecord& record() const { return record_; }
  const Device& device() const { return device_; }
  std::uint64_t device_bytes() const;  // taken of the plan's figure

 private:
  struct RecurrentState {
    CUdeviceptr address;
    std::uint64_t bytes;
  };
  std::vector<RecurrentState> recurrent_states(std::int32_t slot) const;

  struct Resources;

  CUresult query() const;
  static State state_of(CUresult result);

  const CudaDriver& driver_;
  const DeviceContext& context_;
  const SharedMemory& shared_;
  Device device_;
  GpuProgramRecord record_;
  std::string broken_;
  bool timed_ = false;
  std::pair<std::int32_t, bool> timed_graph_;  // of the last step, if it took times; batch 0: it did not
  std::unique_ptr<Resources> resources_;
};

}  // namespace hetcomp::gpu
