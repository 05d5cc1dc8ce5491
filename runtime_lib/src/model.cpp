#include "model.h"

#include <unistd.h>

#include <algorithm>
#include <chrono>
#include <cstring>
#include <map>
#include <nlohmann/json.hpp>
#include <numeric>

#include "cpu_budget.h"
#include "cpu_isa.h"
#include "file.h"
#include "read_faults.h"
#include "status.h"

namespace hetcomp {
namespace {

double seconds_since(std::chrono::steady_clock::time_point start) {
  return std::chrono::duration<double>(std::chrono::steady_clock::now() - start).count();
}

// Tokenizer and ChatTemplate have the same interface.
template <class Text>
std::unique_ptr<Text> load_text(const std::filesystem::path& artifact, const Manifest& manifest,
                                const std::optional<std::string>& file) {
  if (!file) return nullptr;
  const std::filesystem::path path = locate(artifact, manifest, *file);
  std::string error;
  auto text = Text::load(File(path).text(), &error);
  if (!text) throw Error(HETCOMP_BAD_ARTIFACT, path.string() + ": " + error);
  return text;
}

}  // namespace

Model::Model(const std::filesystem::path& artifact, const LoadOptions& options)
    : manifest_(Manifest::read(artifact)), artifact_(artifact), process_(getpid()) {
  const BusErrorsUnblocked unblocked;
  const auto start = std::chrono::steady_clock::now();
  const ProgramRecord& program = choose_program(manifest_, available_isas(), options.isa);
  isa_ = program.isa;
  verify_files(artifact, manifest_);
  library_ = std::make_unique<ProgramLibrary>(locate(artifact, manifest_, program.file), program, manifest_);
  kv_pool_ = std::make_unique<KvPool>(facts().max_batch, facts().kv_tokens);
  if (!manifest_.gpus.empty()) load_gpus(options);
  std::vector<GpuAdaptable> on_gpus = gpu_ ? gpu_->adaptable() : std::vector<GpuAdaptable>();
  if (library_->program().adaptable != nullptr || !on_gpus.empty())
    adapters_ = std::make_unique<ResidentAdapters>(manifest_, library_->program(), std::move(on_gpus),
                                                   [this](Adapter& adapter) { return prepare(adapter); });
  tokenizer_ = load_text<Tokenizer>(artifact, manifest_, manifest_.tokenizer);
  chat_template_ = load_text<ChatTemplate>(artifact, manifest_, manifest_.chat_template);
  allocate(options);
  if (gpu_ && gpu_->streams()) stream_from_weights();
  for (std::int32_t slot = facts().max_batch; slot-- > 0;) free_slots_.push_back(slot);
  reset_statistics();
  statistics_.load_seconds = seconds_since(start);
}

void Model::load_gpus(const LoadOptions& options) {
  gpu::GpuOptions gpu = options.gpu;
  gpu.verify = options.verify_weights;
  gpu_ = std::make_unique<gpu::GpuStep>(artifact_, manifest_, library_->program(), *kv_pool_, gpu);
  const gpu::ProgramSet& programs = gpu_->programs();
  for (std::size_t i = 0; i < programs.size(); ++i)
    gpu_uses_.push_back(
        {programs[i].device().name, programs[i].device().ordinal, programs[i].device_bytes()});
  statistics_.gpu = {gpu_uses_, {}, {}, {}, {}};
}

// Experts are copied to GPUs from where the CPU reads them. Mapped files would have to stay in memory for it.
void Model::stream_from_weights() {
  gpu::HostWeights weights;
  for (std::size_t i = 0; i < manifest_.weights.size(); ++i)
    weights.weights.emplace_back(weights_->addresses()[i], manifest_.weights[i].bytes);
  weights.regions = weights_->regions();
  weights.good = [this] { return weights_->good(); };
  if (residency() == Residency::kMapped && weights_->bytes() > available_memory() / 5 * 4)
    weights.pageable = "they are mapped from files that are larger than the memory";
  gpu::Attachment attachment;
  try {
    attachment = gpu_->attach(weights);
    gpu_->fill_caches(weights);
  } catch (const Error&) {
    weights_->require_good(manifest_);
    throw;
  }
  weights_->require_good(manifest_);
  if (!attachment.not_pinned.empty()) statistics_.notes.push_back(attachment.note(gpu_->caches()));
}

// RAM only where it leaves a fifth of the memory to everyone else, and where every node has room for its
// part: a bound page comes from its node or the process is killed.
Residency Model::choose_residency(hetcomp_weights wanted, std::uint64_t available) const {
  const std::uint64_t others = state_bytes_ + static_cast<std::uint64_t>(library_->program().arena_bytes);
  const auto mapped = [&] {
    Weights::require_room_for_repacked(manifest_, others, available);
    return Residency::kMapped;
  };
  if (wanted == HETCOMP_WEIGHTS_MMAP) return mapped();
  std::map<int, std::uint64_t> needed;  // by machine node; kNoNode: by the whole machine
  const std::vector<std::uint64_t> weights = Weights::ram_bytes(manifest_, Residency::kRam);
  const std::uint64_t all = std::accumulate(weights.begin(), weights.end(), others);
  for (std::size_t n = 0; n < nodes_.size(); ++n)
    needed[nodes_[n].machine_node] += weights[n] + (n == manifest_.main_node ? others : 0);
  const bool automatic = wanted == HETCOMP_WEIGHTS_AUTO;
  const auto fits = [&](std::uint64_t bytes, std::uint64_t room) {
    return bytes <= (automatic ? room / 5 * 4 : room);
  };
  for (const auto& [node, bytes] : needed) {
    const std::uint64_t room = node == kNoNode ? available : available_on_node(node);
    if (fits(bytes, room) && fits(all, available)) continue;
    if (automatic) return mapped();
    const bool whole = !fits(all, available) || node == kNoNode;
    throw Error(HETCOMP_OUT_OF_MEMORY,
                "The weights need " + in_words(all - others) + " and KV cache and activations " +
                    in_words(others) +
                    (whole ? "" : ", " + in_words(bytes) + " of it on NUMA node " + std::to_string(node)) +
                    ", but " + in_words(whole ? available : room) +
                    " of memory are available: use --weights mmap, or free memory.");
  }
  return Residency::kRam;
}

void Model::allocate(const LoadOptions& options) {
  const CpuBudget cpus = cpu_budget(options.threads);
  nodes_ = place_nodes(manifest_.nodes, Weights::ram_bytes(manifest_, Residency::kRam), cpus,
                       machine_nodes(cpus.order));
  const auto arena_bytes = static_cast<std::uint64_t>(library_->program().arena_bytes);
  for (const StateRecord& state : manifest_.states) state_bytes_ += state.bytes;
  const std::uint64_t available = available_memory();
  if (state_bytes_ + arena_bytes > available) {
    throw Error(HETCOMP_OUT_OF_MEMORY,
                "The KV cache of " + std::to_string(facts().kv_tokens) + " positions of at most " +
                    std::to_string(facts().max_batch) + " sequences" +
                    (facts().recurrent ? " with their recurrences' states" : "") + " needs " +
                    in_words(state_bytes_) + " and the activations " + in_words(arena_bytes) + ", but " +
                    in_words(available) +
                    " of memory are available: compile with a smaller --kv-tokens, --context or --batch.");
  }
  const Residency residency = choose_residency(options.weights, available);
  int main = nodes_[manifest_.main_node].machine_node;
  if (main != kNoNode && state_bytes_ + arena_bytes > available_on_node(main)) main = kNoNode;
  arena_ = Memory(arena_bytes, "the activations", main);
  kv_memory_ = std::make_unique<KvMemory>(manifest_, main);
  weights_ = std::make_unique<Weights>(artifact_, manifest_, residency, options.verify_weights, nodes_);
  std::vector<LaneGroup> groups;
  for (const NodePlace& node : nodes_) groups.push_back({node.threads, node.cpus});
  lanes_ = std::make_unique<LaneThreads>(groups);
  statistics_.weight_bytes = weights_->bytes();
  statistics_.state_bytes = state_bytes_;
  statistics_.arena_bytes = arena_bytes;
  describe_nodes();
}

void Model::describe_nodes() {
  for (std::size_t n = 0; n < nodes_.size(); ++n)
    statistics_.nodes.push_back(
        {nodes_[n].plan_node, nodes_[n].machine_node, nodes_[n].threads, weights_->node_bytes()[n]});
  const std::string shared = nodes_.size() > 1 ? shared_nodes_note(nodes_) : "";
  if (!shared.empty()) statistics_.notes.push_back(shared);
  if (nodes_.size() > 1 && shared.empty() && residency() == Residency::kMapped)
    statistics_.notes.push_back(
        "The weights are mapped from their files, whose pages cannot be bound to NUMA nodes; read to RAM "
        "(--weights ram) they lie on their nodes.");
  if (!weights_->bound() || !arena_.bound() || !kv_memory_->bound())
    statistics_.notes.push_back(
        "The system does not let this process bind memory to NUMA nodes (mbind; a container needs "
        "CAP_SYS_NICE): pages lie on the node of the thread that touched them first.");
}

std::string Model::numa_report_json() const {
  nlohmann::ordered_json weights = nlohmann::ordered_json::array();
  for (std::size_t i = 0; i < manifest_.weights.size(); ++i) {
    const WeightRecord& weight = manifest_.weights[i];
    const NodePlace& node = nodes_[weight.node];
    const PagePlaces places = page_places(weights_->addresses()[i], weight.bytes, node.machine_node);
    nlohmann::ordered_json entry{{"weight", weight.name}, {"bytes", weight.bytes}, {"node", node.plan_node}};
    entry["machine_node"] = nullptr;
    if (node.machine_node != kNoNode) entry["machine_node"] = node.machine_node;
    entry["pages"] = places.pages;
    entry["on_node"] = places.on_node;
    entry["elsewhere"] = places.elsewhere;
    entry["absent"] = places.absent;
    weights.push_back(std::move(entry));
  }
  return weights.dump(-1, ' ', false, nlohmann::json::error_handler_t::replace);
}

bool Model::is_eos(std::int32_t id) const {
  return std::ranges::find(facts().eos_token_ids, id) != facts().eos_token_ids.end();
}

const Tokenizer& Model::require_tokenizer() const {
  if (!tokenizer_)
    throw Error(HETCOMP_NO_TOKENIZER,
                "The model " + facts().name + " has no tokenizer: give token ids, not text.");
  return *tokenizer_;
}

const ChatTemplate& Model::require_chat_template() const {
  if (!chat_template_)
    throw Error(HETCOMP_NO_TOKENIZER,
                "The model " + facts().name + " has no chat template: give a plain prompt.");
  return *chat_template_;
}

std::int32_t Model::take_slot() {
  const std::lock_guard lock(slots_mutex_);
  if (free_slots_.empty()) {
    throw Error(HETCOMP_NO_FREE_SLOT,
                "All " + std::to_string(facts().max_batch) +
                    " sequences of this model are in use: free a session, or compile with a "
                    "larger --batch.");
  }
  const std::int32_t slot = free_slots_.back();
  free_slots_.pop_back();
  expert_counts_.forget(slot);
  return slot;
}

void Model::keep_positions(std::int32_t slot, std::int64_t length) {
  kv_pool_->give_back(slot, length);
  kv_memory_->keep(slot, length);
}

std::vector<std::byte> Model::recurrent_state(std::int32_t slot) const {
  const std::lock_guard lock(step_mutex_);  // GPUs must be at rest
  const std::size_t of_gpus = gpu_ ? gpu_->recurrent_bytes() : 0;
  std::vector<std::byte> state(of_gpus + kv_memory_->recurrent_bytes());
  const std::span<std::byte> all(state);
  if (of_gpus > 0) gpu_->save_recurrent(slot, all.first(of_gpus));
  kv_memory_->save(slot, all.subspan(of_gpus));
  return state;
}

void Model::set_recurrent_state(std::int32_t slot, std::span<const std::byte> state) {
  const std::lock_guard lock(step_mutex_);
  const std::size_t of_gpus = gpu_ ? gpu_->recurrent_bytes() : 0;
  if (of_gpus > 0) gpu_->restore_recurrent(slot, state.first(of_gpus));
  kv_memory_->restore(slot, state.subspan(of_gpus));
}

void Model::give_back_slot(std::int32_t slot) {
  keep_positions(slot, 0);
  const std::lock_guard lock(slots_mutex_);
  free_slots_.push_back(slot);  // within the capacity reserved by the constructor
}

void Model::run(const StepRequest& request) {
  const std::lock_guard lock(step_mutex_);
  if (getpid() != process_) {
    throw Error(
        HETCOMP_INVALID_ARGUMENT,
        "This process is a fork of the one that loaded the model and has none of its threads: load the model "
        "after the fork.");
  }
  const std::size_t logit_bytes =
      request.logit_rows.size() * static_cast<std::size_t>(facts().vocab) * sizeof(float);
  float* logits = request.logits;
  if (!(gpu_ && gpu_->gives_logits()) && logits != nullptr &&
      reinterpret_cast<std::uintptr_t>(logits) % Manifest::kAlignment != 0) {
    if (logits_.size() < logit_bytes) logits_ = Memory(logit_bytes, "the logits");
    logits = reinterpret_cast<float*>(logits_.data());
  }
  PhaseStatistics& phase = statistics_.phase(request.phase);
  const hetcomp_step step{
      .n_tokens = static_cast<std::int64_t>(request.ids.size()),
      .ids = request.ids.data(),
      .positions = request.positions.data(),
      .slots = request.slots.data(),
      .n_logit_rows = static_cast<std::int64_t>(request.logit_rows.size()),
      .logit_rows = request.logit_rows.data(),
      .logits = logits,
      .arena = arena_.data(),
      .weights = weights_->addresses().data(),
      .states = kv_memory_->addresses(),
      .context = facts().context,
      .lane_ns = phase.timer_ns.empty() ? nullptr : phase.timer_ns.data(),
      .pinned = nullptr,
      .hand_over = nullptr,
      .defer_experts = deferral_ == HETCOMP_DEFER_ALL ||
                       (deferral_ == HETCOMP_DEFER_GENERATED && request.phase == Phase::kDecode),
      .routing = routing_callback_ || routing_.replays() || expert_counts_.counting()
                     ? routing_.begin(request.positions)
                     : nullptr,
      .trace = lane_trace_.begin(),
      .adapters =
          request.adapters.empty() ? nullptr : step_adapters_.fill(request.adapters, request.logit_rows),
  };
  const auto start = std::chrono::steady_clock::now();
  kv_memory_->write(request.slots, request.positions, *kv_pool_);
  std::int32_t error = 0;
  const BusErrorsUnblocked unblocked;
  // Before anything of the step is used: what failed reads have left is zeros.
  const auto run_lanes = [&](const hetcomp_step& s) {
    error = lanes_->run(library_->program(), s);
    weights_->require_good(manifest_);
  };
  if (gpu_) {
    run_gpus(step, request, run_lanes);
  } else {
    run_lanes(step);
  }
  phase.seconds += seconds_since(start);
  phase.steps += 1;
  phase.tokens += step.n_tokens;
  if (lane_trace_callback_) tell_lane_trace(request, start);
  if (error != 0)
    throw Error(HETCOMP_COMPUTE,
                "A kernel of the program reported error " + std::to_string(error) + "; report this bug.");
  if (logits != request.logits && logit_bytes != 0) std::memcpy(request.logits, logits, logit_bytes);
  if (step.routing) tell_routing(request);
}

ResidentAdapters& Model::require_adapters() {
  if (adapters_) return *adapters_;
  throw Error(
      HETCOMP_INVALID_ARGUMENT,
      "A GPU computes a part of the model " + facts().name +
          ", which has no room for adapters: compile the model with room (--adapters N --adapter-rank "
          "R), with the adapter merged (--adapter FOLDER --merge), or for the CPU alone (--vram 0).");
}

// Between steps.
bool Model::prepare(Adapter& adapter) {
  const std::lock_guard lock(step_mutex_);
  step_adapters_.reserve(library_->program(), adapter.rank());
  return !gpu_ || gpu_->place(adapter);
}

void Model::load_adapter(const std::filesystem::path& file, const std::string& name) {
  require_adapters().load(file, name);
}

void Model::unload_adapter(const std::string& name) { require_adapters().unload(name); }

ResidentAdapters::Use Model::use_adapter(const std::string& name) { return require_adapters().use(name); }

void Model::run_gpus(const hetcomp_step& step, const StepRequest& request,
                     const gpu::GpuStep::Lanes& run_lanes) {
  std::int32_t batch = 0;
  try {
    batch = gpu_->run(step, request.best, request.candidates, run_lanes, request.adapters);
  } catch (const Error&) {
    weights_->require_good(manifest_);  // says more than that the step was given up
    throw;
  }
  weights_->require_good(manifest_);  // copies for the next step included
  statistics_.gpu->steps[batch] += 1;
  read_gpu_statistics();
}

void Model::tell_routing(const StepRequest& request) {
  const Routing& routing = routing_.finish();
  expert_counts_.add(routing, request.slots);
  if (!routing_callback_) return;
  const hetcomp_routing told{
      .struct_size = sizeof(hetcomp_routing),
      .decode = request.phase == Phase::kDecode,
      .n_tokens = static_cast<std::int64_t>(request.ids.size()),
      .n_layers = routing.layers,
      .top_k = routing.top_k,
      .positions = request.positions.data(),
      .slots = request.slots.data(),
      .experts = routing.experts.data(),
      .weights = routing.weights.data(),
  };
  routing_callback_(&told, routing_user_);
}

void Model::tell_lane_trace(const StepRequest& request, std::chrono::steady_clock::time_point start) {
  const auto ns = [](std::chrono::steady_clock::time_point time) {
    return std::chrono::duration_cast<std::chrono::nanoseconds>(time.time_since_epoch()).count();
  };
  const std::int64_t end = ns(std::chrono::steady_clock::now());
  const std::vector<hetcomp_lane_event>& events = lane_trace_.collect();
  const std::vector<hetcomp_gpu_event> of_gpus = gpu_ ? gpu_->events() : std::vector<hetcomp_gpu_event>();
  const hetcomp_step_trace told{
      .struct_size = sizeof(hetcomp_step_trace),
      .decode = request.phase == Phase::kDecode,
      .n_tokens = static_cast<std::int64_t>(request.ids.size()),
      .position = *std::ranges::max_element(request.positions) + 1,
      .begin_ns = ns(start),
      .end_ns = end,
      .n_events = static_cast<std::int64_t>(events.size()),
      .dropped = lane_trace_.dropped(),
      .events = events.data(),
      .n_gpu_events = static_cast<std::int64_t>(of_gpus.size()),
      .gpu_events = of_gpus.data(),
  };
  lane_trace_callback_(&told, lane_trace_user_);
}

void Model::set_lane_trace_callback(hetcomp_lane_trace_callback callback, void* user) {
  const std::lock_guard lock(step_mutex_);
  lane_trace_.resize(callback ? threads() : 0);
  if (gpu_) gpu_->set_timed(callback != nullptr);
  lane_trace_callback_ = callback;
  lane_trace_user_ = user;
}

void Model::replay_routing(Routing routing, std::int64_t tokens) {
  const std::lock_guard lock(step_mutex_);
  routing_.replay(std::move(routing), tokens);
}

void Model::set_routing_callback(hetcomp_routing_callback callback, void* user) {
  const std::lock_guard lock(step_mutex_);
  routing_callback_ = callback;
  routing_user_ = user;
}

void Model::count_experts(std::int64_t half_life) {
  if (half_life < 0) return expert_counts_.stop();
  expert_counts_.begin(half_life);
}

void Model::set_deferral(hetcomp_deferral which) {
  const std::lock_guard lock(step_mutex_);
  deferral_ = which;
}

std::string Model::statistics_json() const {
  const std::lock_guard lock(step_mutex_);
  return to_json(statistics_, manifest_.timers, threads(), isa_,
                 residency() == Residency::kRam ? "ram" : "mmap");
}

void Model::reset_statistics() {
  const std::lock_guard lock(step_mutex_);
  const auto timers = static_cast<std::size_t>(library_->program().n_timers);
  for (PhaseStatistics& phase : statistics_.phases) {
    phase = PhaseStatistics{};
    phase.timer_ns.assign(timers, 0);
  }
  expert_counts_.reset();
  if (!gpu_) return;
  statistics_.gpu->steps.clear();
  gpu_->reset_statistics();
  read_gpu_statistics();
}

void Model::read_gpu_statistics() {
  statistics_.gpu->stream = gpu_->stream_statistics();
  statistics_.gpu->cache = gpu_->cache_statistics();
  statistics_.gpu->weight_bytes = gpu_->weight_bytes();
}

}  // namespace hetcomp
