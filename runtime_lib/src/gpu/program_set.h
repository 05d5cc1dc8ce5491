// The programs of all GPUs that work on a model, run together: one step is one graph on each of them.
#pragma once

#include <chrono>
#include <cstdint>
#include <filesystem>
#include <functional>
#include <map>
#include <memory>
#include <span>
#include <string>
#include <vector>

#include "adapter_slots.h"
#include "gpu_program.h"
#include "shared_memory.h"

namespace hetcomp::gpu {

struct GpuOptions {
  // The GPUs' numbers as the driver counts, one a program; empty: those in the plan's names (gpu:1 is 1). One
  // GPU may run several programs.
  std::vector<int> devices{};
  bool verify = true;  // the hashes of weights; code is always checked
  // How long GPUs and CPU wait for each other before a step is given up, and then for the GPUs to come to
  // rest.
  std::chrono::milliseconds patience{30'000};
  std::chrono::milliseconds drain{5'000};
};

// How experts come from the CPU's weights.
struct Attachment {
  std::string not_pinned;  // why the weights are not; then they come through pinned memory beside them
  std::string not_staged;  // why there is no such memory either: none comes

  // The two in a sentence. caches: GPUs keep experts in slots.
  std::string note(bool caches) const;
};

// A program in an artifact: the plan's name of its GPU, and its file.
struct ProgramFile {
  std::string device;
  std::string program;
};

class ProgramSet {
 public:
  // files: at least one. Throws Error with what is wrong and what to do: the
  // driver's, a device's, the artifact's fault.
  ProgramSet(const CudaDriver& driver, const std::filesystem::path& artifact,
             const std::vector<ProgramFile>& files, const GpuOptions& options);
  // Memory is left behind if a GPU does not come to rest, for the driver would wait for ever.
  ~ProgramSet();
  ProgramSet(const ProgramSet&) = delete;
  ProgramSet& operator=(const ProgramSet&) = delete;

  // Lets experts and weights be copied from the CPU's weights, which must stay where they are. Until then,
  // and where there is no way, no experts are copied: the CPU computes all that GPUs have not got. Throws
  // Error: a program streams what the weights have not got, or weights, for which there is no way.
  Attachment attach(const HostWeights& weights);
  // Then, attached or not: fills the slots of cached experts from the same weights. They change places where
  // the weights are attached. Throws Error.
  void fill_caches(const HostWeights& weights);
  // Whether any program streams experts, or caches some; or streams weights.
  bool streams() const;
  bool caches() const;
  bool streams_weights() const;
  // Whether the graphs of that batch size do.
  bool streams_weights(std::int32_t batch, bool adapted) const;
  // When the CPU has the routing of hand-over `flag`: what GPUs compute is taken from it. See
  // ExpertStream::route and ExpertCache.
  void route(std::uint32_t flag) const;
  // Before the CPU waits for a GPU: one more expert is copied to each cache, if any is to be.
  void copy_next() const;
  // By hand-over: 1 where the CPU has nothing to compute in the running step.
  const std::uint8_t* skip() const { return shared_->skip().data(); }
  // Of all GPUs, since the last reset.
  std::uint64_t weight_bytes() const;
  StreamStatistics stream_statistics() const;
  CacheStatistics cache_statistics() const;
  void reset_statistics();

  // Whether steps take the times of what GPUs do from the next one on, which makes them longer; see
  // GpuProgram::read_times.
  void set_timed(bool timed);

  // Before a step that reads and writes the caches below these positions, by slot. Throws Error.
  void provide_cache(const std::map<std::int32_t, std::int64_t>& positions, const KvPool& pool);

  // One step of so many tokens: sends the step buffers, launches every program's graph, calls cpu_work on
  // this thread (it waits for GPUs and answers), and returns when all GPUs are at rest. may_stream: false
  // where no experts may be streamed in this step, though its graphs could wait for some. adapted: graphs
  // that add the pairs of adapters. One thread at a time. Throws Error: no graph of that batch size, a GPU or
  // the CPU does not answer in time, a fault of a GPU, which is named; what cpu_work throws is passed on. The
  // GPUs are at rest then and the next step may run, but state buffers hold what the step has written; only
  // after a fault of a GPU itself every further call says so, until the model is loaded anew.
  void run(std::int32_t batch, const std::function<void(HandShake&)>& cpu_work, std::int64_t tokens = 1,
           bool may_stream = true, bool adapted = false);

  // What adapters may change on each GPU that has room for some, in the programs' order.
  std::vector<GpuAdaptable> adaptable() const;
  // Gives an adapter the memory that its place says. The GPUs must be at rest. Throws Error.
  void put_adapter(const Adapter& adapter, const AdapterPlace& place) const;

  // From any thread: gives the running step up.
  void abort(const std::string& reason);

  // The host's side of a pinned buffer, or of a step buffer of the first program that has one of that name,
  // to be read and written between steps or, if it is pinned and as hand-overs allow, during one. Throws
  // Error for any other name.
  std::span<std::byte> host(const std::string& buffer) const;

  std::size_t size() const { return programs_.size(); }
  const GpuProgram& operator[](std::size_t i) const { return *programs_[i]; }
  std::uint64_t device_bytes() const;  // of all GPUs

 private:
  std::string stage();
  std::string health() const;
  void end_step() noexcept;
  void wait_for_end();
  bool at_rest();  // of all; notes those that have failed
  void drain();
  std::string running() const;

  GpuOptions options_;
  std::vector<std::unique_ptr<DeviceContext>> contexts_;
  std::unique_ptr<SharedMemory> shared_;
  std::vector<std::unique_ptr<GpuProgram>> programs_;
};

}  // namespace hetcomp::gpu
