#include "gpu_step.h"

#include <algorithm>
#include <bit>
#include <cstring>
#include <limits>
#include <map>
#include <utility>

#include "../status.h"

namespace hetcomp::gpu {
namespace {

[[noreturn]] void refuse(const std::string& what) {
  throw Error(HETCOMP_BAD_ARTIFACT, "gpu/program.json " + what + ": compile the model again.");
}

// What the CPU's program hands over with.
struct Host {
  HandShake& hand_shake;
  ExpertStream* experts;                // null: nothing is streamed in this step
  ExpertCache* cache;                   // null: no experts are cached
  const hetcomp_routing_hook* routing;  // null: nobody asks
};

int wait_for_gpu(void* host, std::uint32_t flag) noexcept {
  auto& [hand_shake, experts, cache, routing] = *static_cast<Host*>(host);
  try {
    if (!hand_shake.wait_for_gpu(flag)) return 0;
    if (routing != nullptr) routing->came(routing->host, flag);
    if (cache != nullptr) cache->count(flag);
    if (experts != nullptr) experts->route(flag);
    if (cache != nullptr) cache->leave_to_cpu(flag);
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
    : program_(driver_, artifact, options),
      pool_(pool),
      max_batch_(manifest.model.max_batch),
      vocab_(static_cast<std::size_t>(manifest.model.vocab)),
      has_hand_overs_(cpu.n_flags > 0) {
  if (program_.record().flags != cpu.n_flags)
    refuse("has " + std::to_string(program_.record().flags) + " hand-overs, the CPU's program " +
           std::to_string(cpu.n_flags));
  find_inputs(manifest.model);
  check_graphs(manifest.model);
  check_cache(manifest.model);
  for (const std::string& name : manifest.gpu->pinned)
    pinned_.push_back(reinterpret_cast<std::uint8_t*>(pinned_buffer(name).data()));
  find_results(manifest.model);
}

// The candidates of exact graphs' rows.
void GpuStep::find_candidates(const BufferRecord& buffer) {
  constexpr std::size_t kRowBytes = CandidateRows::kWords * sizeof(std::int32_t);
  std::size_t rows = 0;
  for (const GraphRecord& graph : program_.record().graphs)
    if (graph.exact) rows = std::max(rows, static_cast<std::size_t>(graph.batch));
  if (buffer.kind != BufferKind::kPinnedOut) refuse("has a buffer candidates that is not pinned");
  if (buffer.bytes != rows * kRowBytes)
    refuse("has " + std::to_string(buffer.bytes) + " bytes for the buffer candidates, not " +
           std::to_string(rows * kRowBytes));
  if (inputs_.inverse_temperatures.empty()) refuse("finds candidates at no temperature");
  const std::span<std::byte> host = program_.host(buffer.name);
  candidates_ =
      CandidateRows({reinterpret_cast<const std::int32_t*>(host.data()), rows * CandidateRows::kWords});
}

// The logits, and the most likely tokens where a program finds them.
void GpuStep::find_results(const ModelFacts& model) {
  const auto rows = static_cast<std::size_t>(model.max_logit_rows);
  for (const BufferRecord& buffer : program_.record().buffers) {
    const bool logits = buffer.name == "logits";
    const bool best = buffer.name == "best";
    if (buffer.name == "candidates") find_candidates(buffer);
    if (!logits && !best) continue;
    if (buffer.kind != (logits ? BufferKind::kResult : BufferKind::kPinnedOut))
      refuse("has a buffer " + buffer.name + " that is not " + (logits ? "a result" : "pinned"));
    const std::size_t bytes = rows * (logits ? vocab_ * sizeof(float) : sizeof(std::int32_t));
    if (buffer.bytes != bytes)
      refuse("has " + std::to_string(buffer.bytes) + " bytes for the buffer " + buffer.name + ", not " +
             std::to_string(bytes));
    if (best) best_ = {reinterpret_cast<std::int32_t*>(program_.host("best").data()), rows};
    gives_logits_ |= logits;
  }
  if (!gives_logits_ && !has_hand_overs_) refuse("has no result buffer logits");
}

void GpuStep::find_inputs(const ModelFacts& model) {
  struct Input {
    std::span<std::int32_t>& place;
    std::int32_t numbers;
  };
  const std::map<std::string, Input> inputs{
      {"ids", {inputs_.ids, model.max_tokens}},
      {"positions", {inputs_.positions, model.max_tokens}},
      {"slots", {inputs_.slots, model.max_tokens}},
      {"logit_rows", {inputs_.logit_rows, model.max_logit_rows}},
      {"rows", {inputs_.rows, 1}},
      {"logit_row_count", {inputs_.logit_row_count, 1}},
      {"inverse_temperatures", {inputs_.inverse_temperatures, model.max_logit_rows}},
  };
  for (const BufferRecord& buffer : program_.record().buffers) {
    if (buffer.kind != BufferKind::kStep) continue;
    const auto input = inputs.find(buffer.name);
    if (input == inputs.end()) refuse("has the step buffer " + buffer.name + ", which nobody fills");
    const auto numbers = static_cast<std::size_t>(input->second.numbers);
    if (buffer.bytes != numbers * sizeof(std::int32_t))
      refuse("has " + std::to_string(buffer.bytes) + " bytes for the step buffer " + buffer.name + ", not " +
             std::to_string(numbers * sizeof(std::int32_t)));
    input->second.place = {reinterpret_cast<std::int32_t*>(program_.host(buffer.name).data()), numbers};
  }
}

void GpuStep::check_graphs(const ModelFacts& model) const {
  for (const GraphRecord& graph : program_.record().graphs) {
    const std::string name = "has a graph for batch size " + std::to_string(graph.batch);
    const std::int32_t most =
        graph.exact ? std::min(model.max_tokens, model.max_logit_rows) : model.max_tokens;
    if (graph.batch > most) refuse(name + ", a step has at most " + std::to_string(most) + " rows");
    std::uint32_t to_cpu = 0;
    for (const NodeRecord& node : graph.nodes)
      if (const auto* hand_over = std::get_if<HandOver>(&node.work))
        to_cpu += hand_over->to == HandOver::To::kCpu ? 1 : 0;
    if (to_cpu != program_.record().flags)
      refuse(name + " that makes " + std::to_string(to_cpu) + " of the " +
             std::to_string(program_.record().flags) + " hand-overs to the CPU");
  }
}

std::span<std::byte> GpuStep::pinned_buffer(const std::string& name) const {
  for (const BufferRecord& buffer : program_.record().buffers)
    if (buffer.name == name &&
        (buffer.kind == BufferKind::kPinnedIn || buffer.kind == BufferKind::kPinnedOut))
      return program_.host(name);
  refuse("has no pinned buffer " + name);
}

// Rows that pad a step write to a block of their own.
void GpuStep::check_cache(const ModelFacts& model) const {
  for (const BufferRecord& buffer : program_.record().buffers) {
    if (buffer.kind != BufferKind::kState) continue;
    if (!buffer.cache) refuse("has the state " + buffer.name + " without a place for rows of nobody");
    const CacheRecord& cache = *buffer.cache;
    const std::uint64_t positions = cache.slot_bytes / cache.block_bytes * cache.block_positions;
    if (cache.slots != model.max_batch || positions < static_cast<std::uint64_t>(model.context))
      refuse("has a KV cache of " + std::to_string(cache.slots) + " sequences of " +
             std::to_string(positions) + " positions, not of " + std::to_string(model.max_batch) + " of " +
             std::to_string(model.context));
  }
}

const GraphRecord& GpuStep::choose_graph(const hetcomp_step& step) const {
  const GraphRecord* best = nullptr;
  std::string sizes;
  for (const GraphRecord& graph : program_.record().graphs) {
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
void GpuStep::fill_inputs(const hetcomp_step& step, const GraphRecord& graph,
                          float inverse_temperature) const {
  const std::int64_t n = step.n_tokens;
  const std::int64_t rows = graph.exact ? graph.batch : n;
  copy_padded(inputs_.ids, step.ids, n, rows, step.ids[n - 1]);
  copy_padded(inputs_.positions, step.positions, n, rows, 0);
  copy_padded(inputs_.slots, step.slots, n, rows, max_batch_);
  const std::int64_t wanted = step.n_logit_rows;
  copy_padded(inputs_.logit_rows, step.logit_rows, wanted, graph.exact ? graph.batch : wanted,
              wanted > 0 ? step.logit_rows[wanted - 1] : 0);
  // 0: no candidates of this row.
  std::ranges::fill(inputs_.inverse_temperatures, 0);
  if (!inputs_.inverse_temperatures.empty())
    inputs_.inverse_temperatures[0] = std::bit_cast<std::int32_t>(inverse_temperature);
  // Of an exact graph all rows are written: those kernels that do not ask how many there are read all of
  // them.
  if (!inputs_.rows.empty()) inputs_.rows[0] = static_cast<std::int32_t>(rows);
  if (!inputs_.logit_row_count.empty())
    inputs_.logit_row_count[0] = static_cast<std::int32_t>(graph.exact ? rows : wanted);
}

void GpuStep::provide_cache(const hetcomp_step& step) {
  std::map<std::int32_t, std::int64_t> positions;
  for (std::int64_t t = 0; t < step.n_tokens; ++t) {
    std::int64_t& end = positions[step.slots[t]];
    end = std::max<std::int64_t>(end, step.positions[t] + 1);
  }
  program_.provide_cache(positions, pool_);
}

std::int32_t GpuStep::run(hetcomp_step step, std::int32_t* best, const CandidateRequest* candidates,
                          const Lanes& lanes) {
  const GraphRecord& graph = choose_graph(step);
  const bool finds = candidates != nullptr && graph.exact && offers_candidates() && step.n_logit_rows > 0;
  fill_inputs(step, graph, finds ? candidates->inverse_temperature : 0);
  provide_cache(step);
  float* const logits = gives_logits_ ? std::exchange(step.logits, nullptr) : nullptr;
  step.pinned = pinned_.data();
  const auto cpu_work = [&](HandShake& hand_shake) {
    if (!has_hand_overs_) return;
    ExpertStream* const experts =
        graph.streams && step.defer_experts == 0 ? program_.expert_stream() : nullptr;
    ExpertCache* const cache = program_.expert_cache();
    Host host{hand_shake, experts, cache, step.routing};
    const std::uint8_t* const skip = experts != nullptr ? experts->skip()
                                     : cache != nullptr ? cache->skip()
                                                        : nullptr;
    hetcomp_hand_over hand_over{&host, wait_for_gpu, answer, skip, std::numeric_limits<std::uint32_t>::max()};
    step.hand_over = &hand_over;
    lanes(step);
  };
  // What is deferred is the CPU's; a step of a prompt defers only where somebody asks for it.
  program_.run(graph.batch, cpu_work, step.n_tokens, step.defer_experts == 0);
  const auto rows = static_cast<std::size_t>(step.n_logit_rows);
  if (finds) {
    const std::optional<Candidates> found = candidates_.read(0);
    if (found && candidates->choose(*found)) return graph.batch;
  }
  if (logits != nullptr && rows > 0)
    program_.fetch("logits", std::as_writable_bytes(std::span(logits, rows * vocab_)));
  if (best != nullptr) std::ranges::copy(best_.first(rows), best);
  return graph.batch;
}

}  // namespace hetcomp::gpu
