#include "program_set.h"

#include <immintrin.h>

#include <algorithm>
#include <iterator>
#include <map>
#include <tuple>

#include "../status.h"
#include "give_way.h"
#include "program_match.h"

namespace hetcomp::gpu {
namespace {

using Clock = std::chrono::steady_clock;
using State = GpuProgram::State;

// A step of decoding takes milliseconds; only what takes much longer gives its core to others.
constexpr auto kSpin = std::chrono::milliseconds(20);

// The number of each program's GPU: the user's, or those that the plan's names have.
std::vector<int> ordinals(const std::vector<std::string>& devices, const std::vector<int>& wanted) {
  if (!wanted.empty() && wanted.size() != devices.size())
    throw Error(HETCOMP_INVALID_ARGUMENT, "The model is compiled for " + std::to_string(devices.size()) +
                                              " GPUs, " + std::to_string(wanted.size()) +
                                              " are given: give a number for each (--gpu 0,1).");
  std::vector<int> found = wanted;
  if (found.empty())
    for (const std::string& device : devices) found.push_back(device_number(device).value_or(0));
  return found;
}

}  // namespace

std::string Attachment::note(bool caches) const {
  constexpr std::size_t kRing = ExpertCopies::kPieces * ExpertCopies::kPieceBytes;
  const std::string because = "because the CPU's weights cannot be pinned (" + not_pinned + ")";
  if (not_staged.empty())
    return "A thread copies weights to the GPU through " + in_words(kRing) + " of pinned memory, " + because +
           ": prompts take longer.";
  const std::string and_slots = caches ? ", nor those in its slots exchanged, " : ", ";
  return "Experts are not streamed to the GPU in prompts" + and_slots + because +
         " and there is no pinned memory to copy them through: " + not_staged;
}

ProgramSet::ProgramSet(const CudaDriver& driver, const std::filesystem::path& artifact,
                       const std::vector<ProgramFile>& files, const GpuOptions& options)
    : options_(options) {
  std::vector<std::string> devices;
  for (const ProgramFile& file : files) devices.push_back(file.device);
  const std::vector<int> numbers = ordinals(devices, options.devices);
  std::vector<ProgramFiles> read;
  for (std::size_t i = 0; i < files.size(); ++i) {
    read.emplace_back(driver, artifact, files[i].program, numbers[i]);
    if (read.back().record.device != files[i].device)
      throw Error(HETCOMP_BAD_ARTIFACT, files[i].program + " is for " + read.back().record.device + ", not " +
                                            files[i].device + ": compile the model again.");
  }
  std::vector<const GpuProgramRecord*> records;
  for (const ProgramFiles& program : read) records.push_back(&program.record);
  require_match(records);
  for (const ProgramFiles& program : read)
    contexts_.push_back(std::make_unique<DeviceContext>(driver, program.device.id));
  shared_ = std::make_unique<SharedMemory>(driver, *contexts_.front(), records, options.patience,
                                           [this] { return health(); });
  for (std::size_t i = 0; i < read.size(); ++i)
    programs_.push_back(
        std::make_unique<GpuProgram>(driver, artifact, read[i], *contexts_[i], *shared_, options.verify));
}

ProgramSet::~ProgramSet() {
  try {
    drain();
    if (at_rest()) return;
  } catch (const Error&) {
    return;  // a context can no longer be entered: the driver has dropped all that was in it
  }
  for (auto& program : programs_) std::ignore = program.release();
  std::ignore = shared_.release();
  for (auto& context : contexts_) std::ignore = context.release();
}

Attachment ProgramSet::attach(const HostWeights& weights) {
  if (!streams() && !streams_weights()) return {};
  Attachment attachment{weights.pageable, {}};
  if (attachment.not_pinned.empty()) attachment.not_pinned = shared_->pin(weights.regions);
  if (!attachment.not_pinned.empty()) attachment.not_staged = stage();
  if (streams_weights() && !attachment.not_staged.empty())
    throw Error(HETCOMP_OUT_OF_MEMORY,
                "Prompts need weights of the CPU on the GPU; these cannot be pinned (" +
                    attachment.not_pinned +
                    "), and there is no pinned memory to copy them through: " + attachment.not_staged);
  if (attachment.not_staged.empty())
    for (const auto& program : programs_) program->attach(weights);
  return attachment;
}

// Returns why there is no memory for it on every GPU, or "".
std::string ProgramSet::stage() {
  try {
    for (const auto& program : programs_) program->stage();
    return {};
  } catch (const Error& error) {
    for (const auto& program : programs_) program->unstage();
    return error.what();
  }
}

void ProgramSet::fill_caches(const HostWeights& weights) {
  for (const auto& program : programs_) program->fill_cache(weights);
}

bool ProgramSet::streams() const {
  return std::ranges::any_of(programs_,
                             [](const auto& program) { return program->expert_stream() != nullptr; });
}

bool ProgramSet::caches() const {
  return std::ranges::any_of(programs_,
                             [](const auto& program) { return program->expert_cache() != nullptr; });
}

bool ProgramSet::streams_weights() const {
  return std::ranges::any_of(programs_,
                             [](const auto& program) { return program->weight_stream() != nullptr; });
}

bool ProgramSet::streams_weights(std::int32_t batch, bool adapted) const {
  return std::ranges::any_of(
      programs_, [&](const auto& program) { return !program->graph(batch, adapted).portions.empty(); });
}

std::uint64_t ProgramSet::weight_bytes() const {
  std::uint64_t bytes = 0;
  for (const auto& program : programs_)
    if (const WeightStream* const weights = program->weight_stream(); weights != nullptr)
      bytes += weights->bytes();
  return bytes;
}

void ProgramSet::route(std::uint32_t flag) const {
  for (const auto& program : programs_) {
    ExpertStream* const experts = program->expert_stream();
    ExpertCache* const cache = program->expert_cache();
    // All choices are counted, before any is taken away.
    if (cache != nullptr) cache->count(flag);
    if (experts != nullptr) experts->route(flag);
    if (cache != nullptr) cache->leave_to_cpu(flag);
  }
}

void ProgramSet::copy_next() const {
  for (const auto& program : programs_) program->copy_next();
}

StreamStatistics ProgramSet::stream_statistics() const {
  StreamStatistics all;
  for (const auto& program : programs_)
    if (const ExpertStream* const experts = program->expert_stream(); experts != nullptr)
      all += experts->statistics();
  return all;
}

CacheStatistics ProgramSet::cache_statistics() const {
  CacheStatistics all;
  for (const auto& program : programs_)
    if (const ExpertCache* const cache = program->expert_cache(); cache != nullptr)
      all += cache->statistics();
  return all;
}

void ProgramSet::reset_statistics() {
  for (const auto& program : programs_) {
    if (ExpertStream* const experts = program->expert_stream(); experts != nullptr)
      experts->reset_statistics();
    if (ExpertCache* const cache = program->expert_cache(); cache != nullptr) cache->reset_statistics();
    if (WeightStream* const weights = program->weight_stream(); weights != nullptr) weights->reset_bytes();
  }
}

void ProgramSet::set_timed(bool timed) {
  for (const auto& program : programs_) program->set_timed(timed);
}

void ProgramSet::provide_cache(const std::map<std::int32_t, std::int64_t>& positions, const KvPool& pool) {
  for (const auto& program : programs_) program->provide_cache(positions, pool);
}

void ProgramSet::run(std::int32_t batch, const std::function<void(HandShake&)>& cpu_work, std::int64_t tokens,
                     bool may_stream, bool adapted) {
  for (const auto& program : programs_) {
    if (!program->broken().empty())
      throw Error(HETCOMP_COMPUTE, program->device().in_words() + " runs no more steps since " +
                                       program->broken() + ": load the model anew.");
    program->require_graph(batch, adapted);
  }
  HandShake& hand_shake = shared_->hand_shake();
  hand_shake.begin_step();
  try {
    for (const auto& program : programs_) program->launch(batch, adapted, tokens, may_stream);
    cpu_work(hand_shake);
    if (!hand_shake.aborted())
      for (const auto& program : programs_) program->look_ahead();
    wait_for_end();
  } catch (...) {
    hand_shake.abort("The CPU's part of the step failed.");
    drain();
    end_step();
    throw;
  }
  const bool aborted = hand_shake.aborted();
  end_step();
  if (aborted) throw Error(HETCOMP_COMPUTE, hand_shake.abort_reason());
}

// What is copied to a GPU raises flags until it has come to its end.
void ProgramSet::end_step() noexcept {
  for (const auto& program : programs_) program->end_step();
  shared_->hand_shake().end_step();
}

std::vector<GpuAdaptable> ProgramSet::adaptable() const {
  std::vector<GpuAdaptable> found;
  for (const auto& program : programs_)
    if (const auto& adapters = program->record().adapters; adapters)
      found.push_back({program->record().device, adapters->rank, adapters->weights});
  return found;
}

void ProgramSet::put_adapter(const Adapter& adapter, const AdapterPlace& place) const {
  std::size_t i = 0;
  for (const auto& program : programs_) {
    if (!program->record().adapters) continue;
    program->put_adapter(place.slot, place.begin[i], adapter.on_gpus()[i]);
    ++i;
  }
}

void ProgramSet::abort(const std::string& reason) { shared_->hand_shake().abort(reason); }

std::string ProgramSet::health() const {
  bool over = true;
  for (const auto& program : programs_) {
    const State state = program->state();
    if (state == State::kFailed) return program->device().in_words() + " failed: " + program->failure() + ".";
    over = over && state == State::kAtRest;
  }
  return over ? "all graphs have come to their end without it: compile the model again." : "";
}

bool ProgramSet::at_rest() {
  bool at_rest = true;
  for (const auto& program : programs_) {
    const State state = program->state();
    if (state == State::kFailed) program->set_broken("it failed: " + program->failure());
    at_rest = at_rest && state != State::kRunning;
  }
  return at_rest;
}

std::string ProgramSet::running() const {
  std::string names;
  for (const auto& program : programs_)
    if (program->state() == State::kRunning)
      names += (names.empty() ? "" : " and ") + program->device().in_words();
  return names;
}

void ProgramSet::wait_for_end() {
  const Clock::time_point start = Clock::now();
  HandShake& hand_shake = shared_->hand_shake();
  while (true) {
    const bool over = at_rest();
    for (const auto& program : programs_)
      if (!program->broken().empty())
        throw Error(HETCOMP_COMPUTE, program->device().in_words() + " failed in a step: " +
                                         program->failure() + "; load the model anew.");
    if (over) return;
    const auto waited = Clock::now() - start;
    // Empty: they have come to rest since.
    if (const std::string late = waited > options_.patience ? running() : ""; !late.empty()) {
      hand_shake.abort(late + " did not come to the end of the step within " +
                       std::to_string(options_.patience.count()) +
                       " ms: a hand-over was not answered, or a kernel hangs; the step was given up.");
    }
    if (hand_shake.aborted()) return drain();
    if (waited > kSpin) give_way(waited);
    _mm_pause();
  }
}

void ProgramSet::drain() {
  const Clock::time_point start = Clock::now();
  while (!at_rest()) {
    const auto waited = Clock::now() - start;
    if (waited > options_.drain) {
      for (const auto& program : programs_)
        if (program->state() == State::kRunning)
          program->set_broken("it did not come to rest " + std::to_string(options_.drain.count()) +
                              " ms after a step was given up");
      return;
    }
    give_way(waited);
  }
}

std::span<std::byte> ProgramSet::host(const std::string& buffer) const {
  for (const auto& program : programs_)
    for (const BufferRecord& record : program->record().buffers)
      if (record.name == buffer && record.kind == BufferKind::kStep) return program->host(buffer);
  return shared_->host(buffer);
}

std::uint64_t ProgramSet::device_bytes() const {
  std::uint64_t bytes = 0;
  for (const auto& program : programs_) bytes += program->device_bytes();
  return bytes;
}

}  // namespace hetcomp::gpu
