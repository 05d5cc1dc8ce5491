#include "gpu_step.h"

#include <algorithm>
#include <bit>
#include <cstring>
#include <limits>
#include <map>
#include <utility>

#include "../status.h"
#include "adapter_memory.h"
#include "program_match.h"

namespace hetcomp::gpu {
namespace {

[[noreturn]] void refuse(const GpuProgramRecord& program, const std::string& what) {
  throw Error(HETCOMP_BAD_ARTIFACT,
              "The program for " + program.device + " " + what + ": compile the model again.");
}

std::vector<ProgramFile> program_files(const Manifest& manifest) {
  std::vector<ProgramFile> files;
  for (const GpuRecord& gpu : manifest.gpus) files.push_back({gpu.device, gpu.program});
  return files;
}

// Whether the adapter of any token changes one of the CPU's weights.
bool changes(const hetcomp_step& step, std::span<const std::size_t> weights) {
  if (step.adapters == nullptr) return false;
  for (std::int64_t i = 0; i < step.adapters->n; ++i)
    for (const std::size_t weight : weights)
      if (step.adapters->tables[i][weight] != nullptr) return true;
  return false;
}

// What the CPU's program hands over with.
struct Host {
  HandShake& hand_shake;
  const ProgramSet& programs;
  const hetcomp_routing_hook* routing;  // null: nobody asks
};

int wait_for_gpu(void* host, std::uint32_t flag) noexcept {
  auto& [hand_shake, programs, routing] = *static_cast<Host*>(host);
  try {
    programs.copy_next();
    if (!hand_shake.wait_for_gpu(flag)) return 0;
    if (routing != nullptr) routing->came(routing->host, flag);
    programs.route(flag);
    return 1;
  } catch (const std::exception& error) {
    hand_shake.abort(error.what());
    return 0;
  }
}

void answer(void* host, std::uint32_t flag) noexcept { static_cast<Host*>(host)->hand_shake.answer(flag); }

// The n values and, up to `size` of them, `fill`.
void copy_padded(std::span<std::int32_t> to, const std::int32_t* values, std::int64_t n, std::int64_t size,
                 std::int32_t fill) {
  if (to.empty()) return;
  std::copy_n(values, n, to.begin());
  std::fill(to.begin() + n, to.begin() + size, fill);
}

}  // namespace

GpuStep::GpuStep(const std::filesystem::path& artifact, const Manifest& manifest, const hetcomp_program& cpu,
                 const KvPool& pool, const GpuOptions& options)
    : programs_(driver_, artifact, program_files(manifest), options),
      pool_(pool),
      max_batch_(manifest.model.max_batch),
      vocab_(static_cast<std::size_t>(manifest.model.vocab)),
      with_cpu_(cpu.n_flags > 0) {
  const GpuProgramRecord& first = programs_[0].record();
  for (std::size_t i = 0; i < programs_.size(); ++i) {
    const GpuProgramRecord& record = programs_[i].record();
    // Where the CPU has no part in any, its program has none.
    if ((with_cpu_ || needs_cpu(record)) && record.flags != cpu.n_flags)
      refuse(record, "has " + std::to_string(record.flags) + " hand-overs, the CPU's program " +
                         std::to_string(cpu.n_flags));
    inputs_.push_back(find_inputs(programs_[i], manifest.model));
  }
  check_graphs(manifest.model);
  for (std::size_t i = 0; i < programs_.size(); ++i) check_cache(programs_[i].record(), manifest.model);
  for (const std::string& name : manifest.pinned)
    pinned_.push_back(reinterpret_cast<std::uint8_t*>(pinned_buffer(name).data()));
  for (std::size_t i = 0; i < programs_.size(); ++i) find_results(programs_[i], inputs_[i], manifest.model);
  if (logits_ == nullptr && !with_cpu_) refuse(first, "has no result buffer logits");
  find_adapters();
}

void GpuStep::find_adapters() {
  std::vector<std::uint64_t> bytes;
  std::int32_t slots = 0;
  for (std::size_t i = 0; i < programs_.size(); ++i) {
    const GpuProgramRecord& record = programs_[i].record();
    if (record.adapters) {
      if (!bytes.empty() && record.adapters->slots != slots)
        refuse(record, "has room for another number of adapters than the one before it");
      slots = record.adapters->slots;
      bytes.push_back(record.adapters->bytes);
    }
    for (const GraphRecord& graph : record.graphs)
      for (const WeightPortion& portion : graph.portions)
        for (const WeightCopy& copy : portion.copies) streamed_.push_back(copy.weight);
    if (!record.stream || (record.adapters && record.adapters->experts)) continue;
    for (const StreamLayer& layer : record.stream->layers)
      for (const StreamOperand& operand : layer.operands)
        for (const ExpertSource& source : operand.sources) streamed_without_pairs_.push_back(source.weight);
  }
  if (!bytes.empty()) adapter_slots_ = std::make_unique<AdapterSlots>(slots, std::move(bytes));
}

// The candidates of exact graphs' rows.
void GpuStep::find_candidates(const GpuProgramRecord& record, const BufferRecord& buffer,
                              const Inputs& inputs) {
  constexpr std::size_t kRowBytes = CandidateRows::kWords * sizeof(std::int32_t);
  std::size_t rows = 0;
  for (const GraphRecord& graph : record.graphs)
    if (graph.exact) rows = std::max(rows, static_cast<std::size_t>(graph.batch));
  if (buffer.kind != BufferKind::kPinnedOut) refuse(record, "has a buffer candidates that is not pinned");
  if (buffer.bytes != rows * kRowBytes)
    refuse(record, "has " + std::to_string(buffer.bytes) + " bytes for the buffer candidates, not " +
                       std::to_string(rows * kRowBytes));
  if (inputs.inverse_temperatures.empty()) refuse(record, "finds candidates at no temperature");
  if (!candidates_.empty()) refuse(record, "has a buffer candidates as another has");
  const std::span<std::byte> host = programs_.host(buffer.name);
  candidates_ =
      CandidateRows({reinterpret_cast<const std::int32_t*>(host.data()), rows * CandidateRows::kWords});
}

// The logits, and the most likely tokens where a program finds them.
void GpuStep::find_results(const GpuProgram& program, const Inputs& inputs, const ModelFacts& model) {
  const auto rows = static_cast<std::size_t>(model.max_logit_rows);
  for (const BufferRecord& buffer : program.record().buffers) {
    const bool logits = buffer.name == "logits";
    const bool best = buffer.name == "best";
    if (buffer.name == "candidates") find_candidates(program.record(), buffer, inputs);
    if (!logits && !best) continue;
    if (buffer.kind != (logits ? BufferKind::kResult : BufferKind::kPinnedOut))
      refuse(program.record(),
             "has a buffer " + buffer.name + " that is not " + (logits ? "a result" : "pinned"));
    const std::size_t bytes = rows * (logits ? vocab_ * sizeof(float) : sizeof(std::int32_t));
    if (buffer.bytes != bytes)
      refuse(program.record(), "has " + std::to_string(buffer.bytes) + " bytes for the buffer " +
                                   buffer.name + ", not " + std::to_string(bytes));
    if (logits ? logits_ != nullptr : !best_.empty())
      refuse(program.record(), "has a buffer " + buffer.name + " as another has");
    if (best) best_ = {reinterpret_cast<std::int32_t*>(programs_.host("best").data()), rows};
    if (logits) logits_ = &program;
  }
}

GpuStep::Inputs GpuStep::find_inputs(const GpuProgram& program, const ModelFacts& model) const {
  struct Input {
    std::span<std::int32_t>& place;
    std::int32_t numbers;
  };
  Inputs found;
  const std::map<std::string, Input> inputs{
      {"ids", {found.ids, model.max_tokens}},
      {"positions", {found.positions, model.max_tokens}},
      {"slots", {found.slots, model.max_tokens}},
      {"logit_rows", {found.logit_rows, model.max_logit_rows}},
      {"adapters", {found.adapters, model.max_tokens}},
      {"logit_adapters", {found.logit_adapters, model.max_logit_rows}},
      {"rows", {found.rows, 1}},
      {"logit_row_count", {found.logit_row_count, 1}},
      {"inverse_temperatures", {found.inverse_temperatures, model.max_logit_rows}},
  };
  for (const BufferRecord& buffer : program.record().buffers) {
    if (buffer.kind != BufferKind::kStep) continue;
    const auto input = inputs.find(buffer.name);
    if (input == inputs.end())
      refuse(program.record(), "has the step buffer " + buffer.name + ", which nobody fills");
    const auto numbers = static_cast<std::size_t>(input->second.numbers);
    if (buffer.bytes != numbers * sizeof(std::int32_t))
      refuse(program.record(), "has " + std::to_string(buffer.bytes) + " bytes for the step buffer " +
                                   buffer.name + ", not " + std::to_string(numbers * sizeof(std::int32_t)));
    input->second.place = {reinterpret_cast<std::int32_t*>(program.host(buffer.name).data()), numbers};
  }
  return found;
}

void GpuStep::check_graphs(const ModelFacts& model) const {
  std::vector<const GpuProgramRecord*> records;
  for (std::size_t i = 0; i < programs_.size(); ++i) records.push_back(&programs_[i].record());
  const GpuProgramRecord& first = *records.front();
  for (const GraphRecord& graph : first.graphs) {
    const std::string name = "has a graph for batch size " + std::to_string(graph.batch);
    const std::int32_t most =
        graph.exact ? std::min(model.max_tokens, model.max_logit_rows) : model.max_tokens;
    if (graph.batch > most) refuse(first, name + ", a step has at most " + std::to_string(most) + " rows");
    const std::size_t made = count_hand_overs(records, graph);
    // Between what a GPU computes in all graphs and what it computes with streamed weights there are none.
    const bool fewer = made < first.flags && programs_.streams_weights(graph.batch, graph.adapted);
    if (made != first.flags && !fewer)
      refuse(first, name + " that makes " + std::to_string(made) + " of the " + std::to_string(first.flags) +
                        " hand-overs with those of other GPUs");
  }
}

std::span<std::byte> GpuStep::pinned_buffer(const std::string& name) const {
  for (std::size_t i = 0; i < programs_.size(); ++i)
    for (const BufferRecord& buffer : programs_[i].record().buffers)
      if (buffer.name == name && is_pinned(buffer.kind)) return programs_.host(name);
  refuse(programs_[0].record(), "has no pinned buffer " + name);
}

// Rows that pad a step write to a block, or a place, of their own.
void GpuStep::check_cache(const GpuProgramRecord& record, const ModelFacts& model) {
  for (const BufferRecord& buffer : record.buffers) {
    if (buffer.recurrent && buffer.recurrent->slots != model.max_batch)
      refuse(record, "has states of recurrences of " + std::to_string(buffer.recurrent->slots) +
                         " sequences, not of " + std::to_string(model.max_batch));
    if (buffer.kind != BufferKind::kState) continue;
    if (!buffer.cache) refuse(record, "has the state " + buffer.name + " without a place for rows of nobody");
    const CacheRecord& cache = *buffer.cache;
    const std::uint64_t positions = cache.slot_bytes / cache.block_bytes * cache.block_positions;
    if (cache.slots != model.max_batch || positions < static_cast<std::uint64_t>(model.context))
      refuse(record, "has a KV cache of " + std::to_string(cache.slots) + " sequences of " +
                         std::to_string(positions) + " positions, not of " + std::to_string(model.max_batch) +
                         " of " + std::to_string(model.context));
  }
}

const GraphRecord& GpuStep::choose_graph(const hetcomp_step& step, bool adapted) const {
  const GraphRecord* best = nullptr;
  std::string sizes;
  for (const GraphRecord& graph : programs_[0].record().graphs) {
    if (graph.adapted != adapted) continue;
    sizes += (sizes.empty() ? "" : ", ") + std::string(graph.exact ? "exactly " : "up to ") +
             std::to_string(graph.batch);
    if (graph.batch < step.n_tokens || (graph.exact && graph.batch < step.n_logit_rows)) continue;
    const auto rank = [](const GraphRecord& g) { return std::pair(!g.exact, g.batch); };
    if (best == nullptr || rank(graph) < rank(*best)) best = &graph;
  }
  if (best != nullptr) return *best;
  throw Error(HETCOMP_INVALID_ARGUMENT,
              "The GPU has no graph for a step of " + std::to_string(step.n_tokens) + " tokens and " +
                  std::to_string(step.n_logit_rows) + " rows of logits, only for " + sizes +
                  " tokens: give fewer at once, or compile the model again.");
}

// Rows of an exact graph that are nobody's tokens must not repeat the last token where the CPU computes a
// part: it computes nothing for them, so that from the next layer on they would write other numbers to the
// token's place in the KV cache. They have the slot behind the last one, whose first position nobody else
// reads.
void GpuStep::fill_inputs(const Inputs& inputs, const hetcomp_step& step, const GraphRecord& graph,
                          float inverse_temperature) const {
  const std::int64_t n = step.n_tokens;
  const std::int64_t rows = graph.exact ? graph.batch : n;
  copy_padded(inputs.ids, step.ids, n, rows, step.ids[n - 1]);
  copy_padded(inputs.positions, step.positions, n, rows, 0);
  copy_padded(inputs.slots, step.slots, n, rows, max_batch_);
  const std::int64_t wanted = step.n_logit_rows;
  copy_padded(inputs.logit_rows, step.logit_rows, wanted, graph.exact ? graph.batch : wanted,
              wanted > 0 ? step.logit_rows[wanted - 1] : 0);
  // 0: no candidates of this row.
  std::ranges::fill(inputs.inverse_temperatures, 0);
  if (!inputs.inverse_temperatures.empty())
    inputs.inverse_temperatures[0] = std::bit_cast<std::int32_t>(inverse_temperature);
  // Of an exact graph all rows are written: those kernels that do not ask how many there are read all of
  // them.
  if (!inputs.rows.empty()) inputs.rows[0] = static_cast<std::int32_t>(rows);
  if (!inputs.logit_row_count.empty())
    inputs.logit_row_count[0] = static_cast<std::int32_t>(graph.exact ? rows : wanted);
}

// Whether any token's adapter changes what GPUs compute.
bool GpuStep::note_adapters(const hetcomp_step& step, std::span<const Adapter* const> adapters) {
  adapters_.clear();
  logit_adapters_.clear();
  for (const Adapter* adapter : adapters)
    adapters_.push_back(adapter != nullptr && adapter->place() != nullptr ? adapter->place()->slot : -1);
  for (std::int64_t i = 0; i < step.n_logit_rows && !adapters_.empty(); ++i)
    logit_adapters_.push_back(adapters_[static_cast<std::size_t>(step.logit_rows[i])]);
  return std::ranges::any_of(adapters_, [](std::int32_t slot) { return slot >= 0; });
}

// Pairs of weights that are streamed to a GPU are the CPU's alone: it must compute with them. The graphs that
// add adapters leave it to it.
const GraphRecord& GpuStep::graph_for(const hetcomp_step& step, std::span<const Adapter* const> adapters) {
  const bool adapted = note_adapters(step, adapters);
  const GraphRecord& graph = choose_graph(step, adapted);
  if (!programs_.streams_weights(graph.batch, adapted) || !changes(step, streamed_)) return graph;
  if (adapter_slots_ == nullptr)
    throw Error(HETCOMP_INVALID_ARGUMENT,
                "An adapter changes weights that a GPU computes with in prompts of " +
                    std::to_string(step.n_tokens) + " tokens: compile the model with --adapters.");
  return choose_graph(step, true);
}

// Rows of nobody have none.
void GpuStep::fill_adapters(const Inputs& inputs, const hetcomp_step& step, const GraphRecord& graph) const {
  const std::int64_t n = step.n_tokens;
  const std::int64_t wanted = step.n_logit_rows;
  copy_padded(inputs.adapters, adapters_.data(), n, graph.exact ? graph.batch : n, -1);
  copy_padded(inputs.logit_adapters, logit_adapters_.data(), wanted, graph.exact ? graph.batch : wanted, -1);
}

bool GpuStep::place(Adapter& adapter) {
  if (!adapter.changes_gpus()) return true;
  std::vector<std::uint64_t> bytes;
  for (const std::vector<GpuPair>& pairs : adapter.on_gpus()) bytes.push_back(AdapterMemory::bytes(pairs));
  if (!adapter_slots_->possible(bytes))
    throw Error(HETCOMP_OUT_OF_MEMORY,
                "The pairs of the adapter " + adapter.name() +
                    " need more of a GPU's memory than the model has for all adapters: compile it with a "
                    "greater --adapters or --adapter-rank.");
  std::shared_ptr<const AdapterPlace> place = adapter_slots_->take(bytes);
  if (!place) return false;
  programs_.put_adapter(adapter, *place);
  adapter.set_place(std::move(place));
  return true;
}

// Experts that are streamed to a GPU are computed there: where their pairs are on the CPU alone, it must have
// all of them. What is deferred is the CPU's, too; a step of a prompt defers only where somebody asks for it.
bool GpuStep::may_stream(const hetcomp_step& step) const {
  return step.defer_experts == 0 && !changes(step, streamed_without_pairs_);
}

void GpuStep::provide_cache(const hetcomp_step& step) {
  std::map<std::int32_t, std::int64_t> positions;
  for (std::int64_t t = 0; t < step.n_tokens; ++t) {
    std::int64_t& end = positions[step.slots[t]];
    end = std::max<std::int64_t>(end, step.positions[t] + 1);
  }
  programs_.provide_cache(positions, pool_);
}

std::int32_t GpuStep::run(hetcomp_step step, std::int32_t* best, const CandidateRequest* candidates,
                          const Lanes& lanes, std::span<const Adapter* const> adapters) {
  const GraphRecord& graph = graph_for(step, adapters);
  const bool adapted = graph.adapted;
  const bool finds = candidates != nullptr && graph.exact && offers_candidates() && step.n_logit_rows > 0;
  for (const Inputs& inputs : inputs_) {
    fill_inputs(inputs, step, graph, finds ? candidates->inverse_temperature : 0);
    if (adapted) fill_adapters(inputs, step, graph);
  }
  provide_cache(step);
  float* const logits = gives_logits() ? std::exchange(step.logits, nullptr) : nullptr;
  step.pinned = pinned_.data();
  const auto cpu_work = [&](HandShake& hand_shake) {
    if (!with_cpu_) return;
    Host host{hand_shake, programs_, step.routing};
    hetcomp_hand_over hand_over{&host,
                                wait_for_gpu,
                                answer,
                                programs_.skip(),
                                programs_.streams_weights(graph.batch, adapted) ? 1 : 0,
                                std::numeric_limits<std::uint32_t>::max()};
    step.hand_over = &hand_over;
    lanes(step);
  };
  programs_.run(graph.batch, cpu_work, step.n_tokens, may_stream(step), adapted);
  const auto rows = static_cast<std::size_t>(step.n_logit_rows);
  if (finds) {
    const std::optional<Candidates> found = candidates_.read(0);
    if (found && candidates->choose(*found)) return graph.batch;
  }
  if (logits != nullptr && rows > 0)
    logits_->fetch("logits", std::as_writable_bytes(std::span(logits, rows * vocab_)));
  if (best != nullptr) std::ranges::copy(best_.first(rows), best);
  return graph.batch;
}

std::size_t GpuStep::recurrent_bytes() const {
  std::size_t bytes = 0;
  for (std::size_t i = 0; i < programs_.size(); ++i) bytes += programs_[i].recurrent_bytes();
  return bytes;
}

void GpuStep::save_recurrent(std::int32_t slot, std::span<std::byte> to) const {
  for (std::size_t i = 0; i < programs_.size(); ++i) {
    const std::size_t bytes = programs_[i].recurrent_bytes();
    programs_[i].save_recurrent(slot, to.first(bytes));
    to = to.subspan(bytes);
  }
}

void GpuStep::restore_recurrent(std::int32_t slot, std::span<const std::byte> from) const {
  for (std::size_t i = 0; i < programs_.size(); ++i) {
    const std::size_t bytes = programs_[i].recurrent_bytes();
    programs_[i].restore_recurrent(slot, from.first(bytes));
    from = from.subspan(bytes);
  }
}

std::vector<hetcomp_gpu_event> GpuStep::events() const {
  std::vector<hetcomp_gpu_event> events;
  for (std::size_t i = 0; i < programs_.size(); ++i) {
    for (const GpuEvent& event : programs_[i].read_times()) {
      const KernelNode* const kernel = event.kernel;
      events.push_back({.begin_ns = event.begin_ns,
                        .end_ns = event.end_ns,
                        .gpu = static_cast<std::int32_t>(i),
                        .work = static_cast<std::int32_t>(event.kind),
                        .layer = kernel != nullptr ? kernel->layer : -1,
                        .launches = event.launches,
                        .bytes = static_cast<std::int64_t>(event.bytes),
                        .kernel = kernel != nullptr ? kernel->kernel.c_str() : "",
                        .role = kernel != nullptr ? kernel->role.c_str() : ""});
    }
  }
  return events;
}

}  // namespace hetcomp::gpu
