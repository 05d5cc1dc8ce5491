#include "gpu_program.h"

#include <algorithm>
#include <map>
#include <set>
#include <tuple>

#include "../file.h"
#include "../status.h"
#include "adapter_memory.h"
#include "program_graph.h"

namespace hetcomp::gpu {
namespace {

constexpr std::uint64_t kLargestDescription = 64U << 20;

File description(const std::filesystem::path& artifact, const std::string& name) {
  File file(inside(artifact, name));
  if (file.size() > kLargestDescription)
    throw Error(HETCOMP_BAD_ARTIFACT,
                file.path().string() + " is " + in_words(file.size()) + ": not a description.");
  return file;
}

GpuProgramRecord read_program(const std::filesystem::path& artifact, const std::string& name,
                              const KernelsByName& kernels) {
  const File file = description(artifact, name);
  return GpuProgramRecord::parse(file.text(), file.path().string(), kernels);
}

KernelsByName read_kernels(const std::filesystem::path& artifact, const Device& device) {
  const File file = description(artifact, "gpu/kernels.json");
  return KernelTable::parse(file.text(), file.path().string())
      .choose(device.compute_capability, device.in_words());
}

std::set<std::string> called(const GpuProgramRecord& program) {
  std::set<std::string> names;
  for (const GraphRecord& graph : program.graphs)
    for (const NodeRecord& node : graph.nodes)
      if (const auto* kernel = std::get_if<KernelNode>(&node.work)) names.insert(kernel->kernel);
  return names;
}

}  // namespace

ProgramFiles::ProgramFiles(const CudaDriver& driver, const std::filesystem::path& artifact,
                           const std::string& file, int ordinal)
    : device(driver, ordinal),
      kernels(read_kernels(artifact, device)),
      record(read_program(artifact, file, kernels)) {}

// What needs the context current when it is made and when it ends.
struct GpuProgram::Resources {
  Resources(const CudaDriver& driver, const std::filesystem::path& artifact, const ProgramFiles& files,
            const DeviceContext& context, const SharedMemory& shared, const GpuProgramRecord& program,
            bool verify)
      : budget(program.device_bytes, files.device.in_words()),
        stream((require_free_memory(driver, budget), create_stream(driver))),
        kernels(driver, files.device, artifact, files.kernels, called(program)),
        buffers(driver, files.device, artifact, program, shared, budget, stream.get(), verify) {
    if (program.stream) copies = std::make_unique<ExpertCopies>(driver, context);
    if (program.expert_cache)
      cache = std::make_unique<ExpertCache>(driver, program, buffers, shared, stream.get(), *copies);
    if (program.stream)
      experts = std::make_unique<ExpertStream>(driver, context, program, buffers, shared, stream.get(),
                                               *copies, cache.get());
    if (program.weight_stream)
      weights = std::make_unique<WeightStream>(driver, context, program, buffers, shared);
    if (program.adapters) adapters = std::make_unique<AdapterMemory>(driver, program, buffers, stream.get());
    const GraphParts parts{driver, context, stream.get(), kernels, buffers, shared.hand_shake()};
    for (const GraphRecord& graph : program.graphs)
      graphs.emplace(std::pair(graph.batch, graph.adapted), ProgramGraph(parts, graph, budget));
    driver.stream_synchronize(stream.get());
  }

  DeviceBudget budget;
  StreamHandle stream;
  LoadedKernels kernels;
  ProgramBuffers buffers;
  std::unique_ptr<ExpertCopies> copies;  // where experts are streamed
  std::unique_ptr<ExpertCache> cache;
  std::unique_ptr<ExpertStream> experts;
  std::unique_ptr<WeightStream> weights;
  std::unique_ptr<AdapterMemory> adapters;                       // where there is room for some
  std::map<std::pair<std::int32_t, bool>, ProgramGraph> graphs;  // by batch size, and whether adapted
};

GpuProgram::GpuProgram(const CudaDriver& driver, const std::filesystem::path& artifact,
                       const ProgramFiles& files, const DeviceContext& context, const SharedMemory& shared,
                       bool verify)
    : driver_(driver), context_(context), shared_(shared), device_(files.device), record_(files.record) {
  const CurrentContext current(driver, context);
  resources_ = std::make_unique<Resources>(driver, artifact, files, context, shared, record_, verify);
}

GpuProgram::~GpuProgram() {
  try {
    const CurrentContext current(driver_, context_);
    resources_.reset();
  } catch (const Error&) {
    // The context can no longer be entered: the driver has dropped all that was in it.
  }
}

void GpuProgram::stage() {
  const CurrentContext current(driver_, context_);
  const auto failed = [this](const std::string& reason) { shared_.hand_shake().abort(reason); };
  if (resources_->copies) resources_->copies->stage(failed);
  if (resources_->weights) resources_->weights->stage(failed);
}

void GpuProgram::unstage() {
  const CurrentContext current(driver_, context_);
  if (resources_->copies) resources_->copies->unstage();
  if (resources_->weights) resources_->weights->unstage();
}

void GpuProgram::attach(const HostWeights& weights) {
  if (resources_->experts) resources_->experts->attach(weights.weights);
  if (resources_->weights) resources_->weights->attach(weights.weights, weights.good);
}

ExpertStream* GpuProgram::expert_stream() const { return resources_->experts.get(); }
ExpertCache* GpuProgram::expert_cache() const { return resources_->cache.get(); }
WeightStream* GpuProgram::weight_stream() const { return resources_->weights.get(); }

void GpuProgram::fill_cache(const HostWeights& weights) {
  if (!resources_->cache) return;
  const CurrentContext current(driver_, context_);
  resources_->copies->check_by(weights.good);
  resources_->cache->fill(weights.weights, resources_->experts->attached());
}

void GpuProgram::require_graph(std::int32_t batch, bool adapted) const {
  if (resources_->graphs.contains({batch, adapted})) return;
  std::string sizes;
  for (const auto& [key, unused] : resources_->graphs)
    if (key.second == adapted) sizes += (sizes.empty() ? "" : ", ") + std::to_string(key.first);
  throw Error(HETCOMP_INVALID_ARGUMENT, "The GPU program has no graph for batch size " +
                                            std::to_string(batch) + ", only for " + sizes + ".");
}

const GraphRecord& GpuProgram::graph(std::int32_t batch, bool adapted) const {
  return *std::ranges::find_if(record_.graphs, [&](const GraphRecord& graph) {
    return graph.batch == batch && graph.adapted == adapted;
  });
}

void GpuProgram::put_adapter(std::int32_t slot, std::uint64_t begin, std::span<const GpuPair> pairs) const {
  const CurrentContext current(driver_, context_);
  resources_->adapters->put(slot, begin, pairs);
}

void GpuProgram::launch(std::int32_t batch, bool adapted, std::int64_t tokens, bool may_stream) {
  const CurrentContext current(driver_, context_);
  const GraphRecord& wanted = this->graph(batch, adapted);
  const bool waits = wanted.streams;
  resources_->buffers.send_step(resources_->stream.get());
  timed_graph_ = {timed_ ? batch : 0, adapted};
  if (resources_->copies) resources_->copies->set_timed(timed_);
  if (resources_->weights) {
    resources_->weights->copies().set_timed(timed_);
    resources_->weights->begin(wanted);
  }
  // What is streamed is what the cache does not hold in this step. Prompts stream, steps of decoding do not.
  if (resources_->cache) resources_->cache->begin(tokens, !waits);
  if (waits) resources_->experts->begin(may_stream ? tokens : 0);
  ProgramGraph& graph = resources_->graphs.at({batch, adapted});
  driver_.graph_launch(timed_ ? graph.timed() : graph.get(), resources_->stream.get());
}

void GpuProgram::copy_next() const {
  if (!resources_->cache || resources_->cache->all_begun()) return;
  const CurrentContext current(driver_, context_);
  resources_->cache->copy_next();
}

std::vector<GpuEvent> GpuProgram::read_times() const {
  std::vector<GpuEvent> times;
  if (timed_graph_.first == 0) return times;
  const CurrentContext current(driver_, context_);
  const EventClock clock(driver_, resources_->stream.get());
  resources_->graphs.at(timed_graph_).read_times(clock, times);
  if (resources_->copies) resources_->copies->read_times(clock, times);
  if (resources_->weights) resources_->weights->copies().read_times(clock, times);
  return times;
}

void GpuProgram::look_ahead() const {
  if (!resources_->cache) return;
  const CurrentContext current(driver_, context_);
  resources_->cache->look_ahead();
}

void GpuProgram::end_step() noexcept {
  if (!resources_->experts && !resources_->weights) return;  // nothing is cached either
  try {
    const CurrentContext current(driver_, context_);
    // A copy of weights that failed has failed the graph as well, which has said so.
    if (resources_->weights) std::ignore = resources_->weights->end();
    if (!resources_->experts) return;
    const bool streamed = resources_->experts->end();
    if (resources_->cache) resources_->cache->end(streamed);
  } catch (const Error&) {
    // The context can no longer be entered: the driver has dropped all that was in it.
  }
}

void GpuProgram::provide_cache(const std::map<std::int32_t, std::int64_t>& positions, const KvPool& pool) {
  if (!broken_.empty()) return;  // the step says so
  const CurrentContext current(driver_, context_);
  resources_->buffers.provide_cache(positions, pool);
}

CUresult GpuProgram::query() const {
  const CurrentContext current(driver_, context_);
  return driver_.stream_query.raw(resources_->stream.get());
}

GpuProgram::State GpuProgram::state_of(CUresult result) {
  if (result == CUDA_ERROR_NOT_READY) return State::kRunning;
  return result == CUDA_SUCCESS ? State::kAtRest : State::kFailed;
}

std::span<std::byte> GpuProgram::host(const std::string& buffer) const {
  for (std::size_t i = 0; i < record_.buffers.size(); ++i)
    if (record_.buffers[i].name == buffer && !resources_->buffers.host(i).empty())
      return resources_->buffers.host(i);
  throw Error(HETCOMP_INVALID_ARGUMENT, "The GPU program has no step buffer " + buffer + ".");
}

void GpuProgram::fetch(const std::string& buffer, std::span<std::byte> to) const {
  for (std::size_t i = 0; i < record_.buffers.size(); ++i) {
    if (record_.buffers[i].name != buffer || record_.buffers[i].kind != BufferKind::kResult) continue;
    if (to.size() > record_.buffers[i].bytes)
      throw Error(HETCOMP_INVALID_ARGUMENT, "The buffer " + buffer + " has fewer bytes than are wanted.");
    const CurrentContext current(driver_, context_);
    driver_.copy_to_host(to.data(), resources_->buffers.address({i, 0}), to.size(), resources_->stream.get());
    driver_.stream_synchronize(resources_->stream.get());
    return;
  }
  throw Error(HETCOMP_INVALID_ARGUMENT, "The GPU program has no result buffer " + buffer + ".");
}

std::vector<GpuProgram::RecurrentState> GpuProgram::recurrent_states(std::int32_t slot) const {
  std::vector<RecurrentState> states;
  for (std::size_t i = 0; i < record_.buffers.size(); ++i) {
    if (!record_.buffers[i].recurrent) continue;
    for (const RecurrentRecord::State& state : record_.buffers[i].recurrent->states) {
      const std::uint64_t offset = state.offset + static_cast<std::uint64_t>(slot) * state.slot_bytes;
      states.push_back({resources_->buffers.address({i, offset}), state.slot_bytes});
    }
  }
  return states;
}

std::size_t GpuProgram::recurrent_bytes() const {
  std::size_t bytes = 0;
  for (const RecurrentState& state : recurrent_states(0)) bytes += state.bytes;
  return bytes;
}

void GpuProgram::save_recurrent(std::int32_t slot, std::span<std::byte> to) const {
  const CurrentContext current(driver_, context_);
  for (const RecurrentState& state : recurrent_states(slot)) {
    driver_.copy_to_host(to.data(), state.address, state.bytes, resources_->stream.get());
    to = to.subspan(state.bytes);
  }
  driver_.stream_synchronize(resources_->stream.get());
}

void GpuProgram::restore_recurrent(std::int32_t slot, std::span<const std::byte> from) const {
  const CurrentContext current(driver_, context_);
  for (const RecurrentState& state : recurrent_states(slot)) {
    driver_.copy_to_device(state.address, from.data(), state.bytes, resources_->stream.get());
    from = from.subspan(state.bytes);
  }
  driver_.stream_synchronize(resources_->stream.get());
}

std::uint64_t GpuProgram::device_bytes() const { return resources_->budget.taken(); }

}  // namespace hetcomp::gpu
