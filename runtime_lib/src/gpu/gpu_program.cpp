#include "gpu_program.h"

#include <immintrin.h>

#include <algorithm>
#include <map>
#include <set>
#include <thread>
#include <tuple>

#include "../file.h"
#include "../status.h"
#include "program_graph.h"

namespace hetcomp::gpu {
namespace {

using Clock = std::chrono::steady_clock;

constexpr std::uint64_t kLargestDescription = 64U << 20;
// A step of decoding takes milliseconds; only what takes much longer gives its core to others.
constexpr auto kSpin = std::chrono::milliseconds(20);

File description(const std::filesystem::path& artifact, const std::string& name) {
  File file(inside(artifact, "gpu/" + name));
  if (file.size() > kLargestDescription)
    throw Error(HETCOMP_BAD_ARTIFACT,
                file.path().string() + " is " + in_words(file.size()) + ": not a description.");
  return file;
}

GpuProgramRecord read_program(const std::filesystem::path& artifact, const KernelsByName& kernels) {
  const File file = description(artifact, "program.json");
  return GpuProgramRecord::parse(file.text(), file.path().string(), kernels);
}

KernelsByName read_kernels(const std::filesystem::path& artifact, const Device& device) {
  const File file = description(artifact, "kernels.json");
  return KernelTable::parse(file.text(), file.path().string()).choose(device.compute_capability, device.name);
}

std::set<std::string> called(const GpuProgramRecord& program) {
  std::set<std::string> names;
  for (const GraphRecord& graph : program.graphs)
    for (const NodeRecord& node : graph.nodes)
      if (const auto* kernel = std::get_if<KernelNode>(&node.work)) names.insert(kernel->kernel);
  return names;
}

}  // namespace

// What needs the context current when it is made and when it ends.
struct GpuProgram::Resources {
  Resources(const CudaDriver& driver, const std::filesystem::path& artifact, const GpuOptions& options,
            const Device& device, const DeviceContext& context, const KernelsByName& kernel_records,
            const GpuProgramRecord& program, const HandShake::Health& health)
      : budget(program.device_bytes),
        stream((require_free_memory(driver, device, budget), create_stream(driver))),
        kernels(driver, device, artifact, kernel_records, called(program)),
        buffers(driver, device, artifact, program, budget, stream.get(), options.verify),
        hand_shake(driver, program.all_flags(), options.patience, health) {
    if (program.expert_cache)
      cache = std::make_unique<ExpertCache>(driver, context, program, buffers, stream.get());
    if (program.stream)
      experts = std::make_unique<ExpertStream>(driver, context, program, buffers, hand_shake, stream.get(),
                                               cache.get());
    const GraphParts parts{driver, context, stream.get(), kernels, buffers, hand_shake};
    for (const GraphRecord& graph : program.graphs)
      graphs.emplace(graph.batch, ProgramGraph(parts, graph, budget));
    driver.stream_synchronize(stream.get());
  }

  DeviceBudget budget;
  StreamHandle stream;
  LoadedKernels kernels;
  ProgramBuffers buffers;
  HandShake hand_shake;
  std::unique_ptr<ExpertCache> cache;
  std::unique_ptr<ExpertStream> experts;
  std::map<std::int32_t, ProgramGraph> graphs;  // by batch size
};

GpuProgram::GpuProgram(const CudaDriver& driver, const std::filesystem::path& artifact,
                       const GpuOptions& options)
    : driver_(driver), options_(options), device_(driver, options.device) {
  const KernelsByName kernels = read_kernels(artifact, device_);
  record_ = read_program(artifact, kernels);
  context_ = std::make_unique<DeviceContext>(driver, device_.id);
  const CurrentContext current(driver, *context_);
  resources_ = std::make_unique<Resources>(driver, artifact, options, device_, *context_, kernels, record_,
                                           [this] { return health(); });
}

GpuProgram::~GpuProgram() {
  bool at_rest = true;
  try {
    const CurrentContext current(driver_, *context_);
    drain();
    at_rest = driver_.stream_query.raw(resources_->stream.get()) != CUDA_ERROR_NOT_READY;
    if (at_rest) resources_.reset();
  } catch (const Error& error) {
    broken_ =
        error.what();  // the context can no longer be entered: the driver has dropped all that was in it
  }
  if (at_rest) return;
  std::ignore = resources_.release();
  std::ignore = context_.release();
}

std::string GpuProgram::attach(const HostWeights& weights) {
  if (!resources_->experts) return {};
  const CurrentContext current(driver_, *context_);
  return resources_->experts->attach(weights);
}

void GpuProgram::fill_cache(const HostWeights& weights) {
  if (!resources_->cache) return;
  const CurrentContext current(driver_, *context_);
  resources_->cache->fill(weights, resources_->experts->attached());
}

ExpertStream* GpuProgram::expert_stream() const { return resources_->experts.get(); }
ExpertCache* GpuProgram::expert_cache() const { return resources_->cache.get(); }

void GpuProgram::run(std::int32_t batch, const std::function<void(HandShake&)>& cpu_work, std::int64_t tokens,
                     bool copies) {
  if (!broken_.empty()) {
    throw Error(HETCOMP_COMPUTE,
                device_.name + " runs no more steps since " + broken_ + ": load the model anew.");
  }
  const auto graph = resources_->graphs.find(batch);
  if (graph == resources_->graphs.end()) {
    std::string sizes;
    for (const auto& [size, unused] : resources_->graphs)
      sizes += (sizes.empty() ? "" : ", ") + std::to_string(size);
    throw Error(HETCOMP_INVALID_ARGUMENT, "The GPU program has no graph for batch size " +
                                              std::to_string(batch) + ", only for " + sizes + ".");
  }
  const CurrentContext current(driver_, *context_);
  HandShake& hand_shake = resources_->hand_shake;
  const bool streams = std::ranges::find(record_.graphs, batch, &GraphRecord::batch)->streams;
  const auto end_copies = [&] {
    if (streams) resources_->experts->end();
    if (resources_->cache) resources_->cache->end();
  };
  hand_shake.begin_step();
  try {
    resources_->buffers.send_step(resources_->stream.get());
    if (resources_->cache) resources_->cache->begin(tokens, !streams);
    if (streams) resources_->experts->begin(copies ? tokens : 0);
    driver_.graph_launch(graph->second.get(), resources_->stream.get());
    cpu_work(hand_shake);
    wait_for_end();
  } catch (...) {
    hand_shake.abort("The CPU's part of the step failed.");
    drain();
    end_copies();
    hand_shake.end_step();
    throw;
  }
  end_copies();
  const bool aborted = hand_shake.aborted();
  hand_shake.end_step();
  if (aborted) throw Error(HETCOMP_COMPUTE, hand_shake.abort_reason());
}

void GpuProgram::provide_cache(const std::map<std::int32_t, std::int64_t>& positions, const KvPool& pool) {
  if (!broken_.empty()) return;  // run() says so
  const CurrentContext current(driver_, *context_);
  resources_->buffers.provide_cache(positions, pool);
}

void GpuProgram::abort(const std::string& reason) { resources_->hand_shake.abort(reason); }

std::string GpuProgram::health() const {
  const CurrentContext current(driver_, *context_);
  const CUresult result = driver_.stream_query.raw(resources_->stream.get());
  if (result == CUDA_ERROR_NOT_READY) return {};
  if (result == CUDA_SUCCESS)
    return "the GPU's graph has come to its end without it: compile the model again.";
  return "the GPU failed: " + driver_.in_words(result) + ".";
}

void GpuProgram::wait_for_end() {
  const Clock::time_point start = Clock::now();
  HandShake& hand_shake = resources_->hand_shake;
  while (true) {
    const CUresult result = driver_.stream_query.raw(resources_->stream.get());
    if (result == CUDA_SUCCESS) return;
    if (result != CUDA_ERROR_NOT_READY) {
      note_failure(result);
      throw Error(HETCOMP_COMPUTE,
                  device_.name + " failed in a step: " + driver_.in_words(result) + "; load the model anew.");
    }
    const auto waited = Clock::now() - start;
    if (waited > options_.patience) {
      hand_shake.abort("The GPU did not come to the end of the step within " +
                       std::to_string(options_.patience.count()) +
                       " ms: a hand-over was not answered, or a kernel hangs; the step was given up.");
    }
    if (hand_shake.aborted()) return drain();
    if (waited > kSpin) std::this_thread::yield();
    _mm_pause();
  }
}

void GpuProgram::drain() {
  const Clock::time_point start = Clock::now();
  while (true) {
    const CUresult result = driver_.stream_query.raw(resources_->stream.get());
    if (result == CUDA_SUCCESS) return;
    if (result != CUDA_ERROR_NOT_READY) return note_failure(result);
    if (Clock::now() - start > options_.drain) {
      broken_ = "it did not come to rest " + std::to_string(options_.drain.count()) +
                " ms after a step was given up";
      return;
    }
    std::this_thread::yield();
  }
}

void GpuProgram::note_failure(CUresult result) { broken_ = "it failed: " + driver_.in_words(result); }

std::span<std::byte> GpuProgram::host(const std::string& buffer) const {
  for (std::size_t i = 0; i < record_.buffers.size(); ++i)
    if (record_.buffers[i].name == buffer && !resources_->buffers.host(i).empty())
      return resources_->buffers.host(i);
  throw Error(HETCOMP_INVALID_ARGUMENT, "The GPU program has no step or pinned buffer " + buffer + ".");
}

void GpuProgram::fetch(const std::string& buffer, std::span<std::byte> to) const {
  for (std::size_t i = 0; i < record_.buffers.size(); ++i) {
    if (record_.buffers[i].name != buffer || record_.buffers[i].kind != BufferKind::kResult) continue;
    if (to.size() > record_.buffers[i].bytes)
      throw Error(HETCOMP_INVALID_ARGUMENT, "The buffer " + buffer + " has fewer bytes than are wanted.");
    const CurrentContext current(driver_, *context_);
    driver_.copy_to_host(to.data(), resources_->buffers.address({i, 0}), to.size(), resources_->stream.get());
    driver_.stream_synchronize(resources_->stream.get());
    return;
  }
  throw Error(HETCOMP_INVALID_ARGUMENT, "The GPU program has no result buffer " + buffer + ".");
}

std::uint64_t GpuProgram::device_bytes() const { return resources_->budget.taken(); }

}  // namespace hetcomp::gpu
