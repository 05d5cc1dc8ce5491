#include "gpu_step.h"

#include <algorithm>
#include <cstring>
#include <limits>
#include <map>
#include <utility>

#include "../status.h"
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

int wait_for_gpu(void* hand_shake, std::uint32_t flag) noexcept {
  auto& shared = *static_cast<HandShake*>(hand_shake);
  try {
    return shared.wait_for_gpu(flag) ? 1 : 0;
  } catch (const std::exception& error) {
    shared.abort(error.what());
    return 0;
  }
}

void answer(void* hand_shake, std::uint32_t flag) noexcept {
  static_cast<HandShake*>(hand_shake)->answer(flag);
}

// The n values and, up to `size` of them, `fill`.
void copy_padded(std::span<std::int32_t> to, const std::int32_t* values, std::int64_t n, std::int64_t size,
                 std::int32_t fill) {
  if (to.empty()) return;
  std::copy_n(values, n, to.begin());
  std::fill(to.begin() + n, to.begin() + size, fill);
}

}  // namespace

GpuStep::GpuStep(const std::filesystem::path& artifact, const Manifest& manifest, const hetcomp_program& cpu,
                 const GpuOptions& options)
    : programs_(driver_, artifact, program_files(manifest), options),
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
  for (const std::string& name : manifest.pinned)
    pinned_.push_back(reinterpret_cast<std::uint8_t*>(pinned_buffer(name).data()));
  for (std::size_t i = 0; i < programs_.size(); ++i) find_results(programs_[i], manifest.model);
  if (logits_ == nullptr && !with_cpu_) refuse(first, "has no result buffer logits");
}

// The logits, and the most likely tokens where a program finds them.
void GpuStep::find_results(const GpuProgram& program, const ModelFacts& model) {
  const auto rows = static_cast<std::size_t>(model.max_logit_rows);
  for (const BufferRecord& buffer : program.record().buffers) {
    const bool logits = buffer.name == "logits";
    const bool best = buffer.name == "best";
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
      {"rows", {found.rows, 1}},
      {"logit_row_count", {found.logit_row_count, 1}},
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
    const std::size_t made = count_hand_overs(records, graph.batch);
    if (made != first.flags)
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

// Where rows of a graph that are nobody's tokens may write their KV. Beside the CPU they must not repeat the
// last token: the CPU computes nothing for them, so that from the next layer on they would write other
// numbers to its place. Any place will do that no token of this step reads, and that is written before a
// later step reads it: the one behind the last token; or the last position of a slot, which only a token of
// that position reads.
std::optional<GpuStep::Place> GpuStep::padding_place(const hetcomp_step& step) const {
  const std::int64_t last = step.n_tokens - 1;
  if (!with_cpu_) return Place{step.slots[last], step.positions[last]};
  if (step.positions[last] + 1 < step.context) return Place{step.slots[last], step.positions[last] + 1};
  const auto end = static_cast<std::int32_t>(step.context - 1);
  for (std::int32_t slot = 0; slot < max_batch_; ++slot) {
    bool free = true;
    for (std::int64_t t = 0; t < step.n_tokens; ++t)
      free = free && (step.slots[t] != slot || step.positions[t] != end);
    if (free) return Place{slot, end};
  }
  return std::nullopt;
}

const GraphRecord& GpuStep::choose_graph(const hetcomp_step& step, bool may_pad) const {
  const GraphRecord* best = nullptr;
  std::string sizes;
  for (const GraphRecord& graph : programs_[0].record().graphs) {
    sizes += (sizes.empty() ? "" : ", ") + std::string(graph.exact ? "exactly " : "up to ") +
             std::to_string(graph.batch);
    if (graph.batch < step.n_tokens || (graph.exact && graph.batch < step.n_logit_rows)) continue;
    if (graph.exact && graph.batch > step.n_tokens && !may_pad) continue;
    const auto rank = [](const GraphRecord& g) { return std::pair(!g.exact, g.batch); };
    if (best == nullptr || rank(graph) < rank(*best)) best = &graph;
  }
  if (best != nullptr) return *best;
  throw Error(HETCOMP_INVALID_ARGUMENT,
              "The GPU has no graph for a step of " + std::to_string(step.n_tokens) + " tokens and " +
                  std::to_string(step.n_logit_rows) + " rows of logits, only for " + sizes +
                  " tokens: give fewer at once, or compile the model again.");
}

void GpuStep::fill_inputs(const Inputs& inputs, const hetcomp_step& step, const GraphRecord& graph,
                          const std::optional<Place>& padding) {
  const std::int64_t n = step.n_tokens;
  const std::int64_t rows = graph.exact ? graph.batch : n;
  const Place place = padding.value_or(Place{});  // without one there are no rows to pad
  copy_padded(inputs.ids, step.ids, n, rows, step.ids[n - 1]);
  copy_padded(inputs.positions, step.positions, n, rows, place.position);
  copy_padded(inputs.slots, step.slots, n, rows, place.slot);
  const std::int64_t wanted = step.n_logit_rows;
  copy_padded(inputs.logit_rows, step.logit_rows, wanted, graph.exact ? graph.batch : wanted,
              wanted > 0 ? step.logit_rows[wanted - 1] : 0);
  // Of an exact graph all rows are written: those kernels that do not ask how many there are read all of
  // them.
  if (!inputs.rows.empty()) inputs.rows[0] = static_cast<std::int32_t>(rows);
  if (!inputs.logit_row_count.empty())
    inputs.logit_row_count[0] = static_cast<std::int32_t>(graph.exact ? rows : wanted);
}

std::int32_t GpuStep::run(hetcomp_step step, std::int32_t* best, const Lanes& lanes) {
  const std::optional<Place> padding = padding_place(step);
  const GraphRecord& graph = choose_graph(step, padding.has_value());
  for (const Inputs& inputs : inputs_) fill_inputs(inputs, step, graph, padding);
  float* const logits = gives_logits() ? std::exchange(step.logits, nullptr) : nullptr;
  step.pinned = pinned_.data();
  programs_.run(graph.batch, [&](HandShake& hand_shake) {
    if (!with_cpu_) return;
    hetcomp_hand_over hand_over{&hand_shake, wait_for_gpu, answer, std::numeric_limits<std::uint32_t>::max()};
    step.hand_over = &hand_over;
    lanes(step);
  });
  const auto rows = static_cast<std::size_t>(step.n_logit_rows);
  if (logits != nullptr && rows > 0)
    logits_->fetch("logits", std::as_writable_bytes(std::span(logits, rows * vocab_)));
  if (best != nullptr) std::ranges::copy(best_.first(rows), best);
  return graph.batch;
}

}  // namespace hetcomp::gpu
