// A step of a model that is computed on GPUs, alone or together with the CPU's program.
#pragma once

#include <cstdint>
#include <filesystem>
#include <functional>
#include <memory>
#include <span>
#include <string>
#include <vector>

#include "../candidates.h"
#include "../kv_pool.h"
#include "../manifest.h"
#include "candidate_rows.h"
#include "driver.h"
#include "hetcomp/hetcomp.h"
#include "hetcomp/program.h"
#include "program_set.h"

namespace hetcomp::gpu {

class GpuStep {
 public:
  // cpu: the artifact's program for the CPU. pool: of what the sequences hold of the KV cache; it must live
  // as long. Throws Error: what ProgramSet's constructor does, and gpu/ does not fit the manifest or the
  // CPU's program.
  GpuStep(const std::filesystem::path& artifact, const Manifest& manifest, const hetcomp_program& cpu,
          const KvPool& pool, const GpuOptions& options);

  // The step with what a program needs beside a GPU, for the lanes to run.
  using Lanes = std::function<void(const hetcomp_step&)>;
  // Runs one step, which has the tokens and the caller's logits (null: not wanted). best: null, or where to
  // put the most likely token of each row of logits, -1 where they are not finite. adapters: by token, null
  // where it has none; empty: no token has; all of them have their place. candidates: null, or
  // asked first, where the graph finds them: the logits may then not be fetched. Returns the batch size of
  // the graph that it ran. One thread at a time. Throws Error as ProgramSet::run does; what `lanes` and the
  // request throw is passed on.
  std::int32_t run(hetcomp_step step, std::int32_t* best, const CandidateRequest* candidates,
                   const Lanes& lanes, std::span<const Adapter* const> adapters = {});

  // What adapters may change on GPUs; empty: nothing.
  std::vector<GpuAdaptable> adaptable() const { return programs_.adaptable(); }
  // Gives an adapter its place on the GPUs, between steps; false: there is none at the moment. Throws Error:
  // there never is.
  bool place(Adapter& adapter);

  // Lets experts and weights be copied from the CPU's weights; what ProgramSet::attach returns.
  Attachment attach(const HostWeights& weights) { return programs_.attach(weights); }
  // Then, attached or not: what ProgramSet::fill_caches does.
  void fill_caches(const HostWeights& weights) { programs_.fill_caches(weights); }
  bool streams() const { return programs_.streams() || programs_.streams_weights(); }
  bool caches() const { return programs_.caches(); }
  // Since the last reset; empty: nothing is streamed, or cached.
  std::optional<StreamStatistics> stream_statistics() const {
    if (!programs_.streams()) return std::nullopt;
    return programs_.stream_statistics();
  }
  std::optional<CacheStatistics> cache_statistics() const {
    if (!programs_.caches()) return std::nullopt;
    return programs_.cache_statistics();
  }
  std::optional<std::uint64_t> weight_bytes() const {
    if (!programs_.streams_weights()) return std::nullopt;
    return programs_.weight_bytes();
  }
  void reset_statistics() { programs_.reset_statistics(); }

  bool offers_best() const { return !best_.empty(); }
  bool offers_candidates() const { return !candidates_.empty(); }
  // Whether a GPU computes the logits; else the CPU's program does, into the step's.
  bool gives_logits() const { return logits_ != nullptr; }

  void set_timed(bool timed) { programs_.set_timed(timed); }
  // Of the last step, where times are taken; strings of this object. Throws Error.
  std::vector<hetcomp_gpu_event> events() const;

  // Of a sequence's recurrences on all GPUs; what GpuProgram's do.
  std::size_t recurrent_bytes() const;
  void save_recurrent(std::int32_t slot, std::span<std::byte> to) const;
  void restore_recurrent(std::int32_t slot, std::span<const std::byte> from) const;

  const ProgramSet& programs() const { return programs_; }

 private:
  struct Inputs {  // of a GPU, on the host; empty where no kernel reads it
    std::span<std::int32_t> ids, positions, slots, logit_rows, adapters, logit_adapters, rows,
        logit_row_count, inverse_temperatures;
  };

  Inputs find_inputs(const GpuProgram& program, const ModelFacts& model) const;
  void check_graphs(const ModelFacts& model) const;
  void find_results(const GpuProgram& program, const Inputs& inputs, const ModelFacts& model);
  std::span<std::byte> pinned_buffer(const std::string& name) const;
  static void check_cache(const GpuProgramRecord& record, const ModelFacts& model);
  void find_adapters();
  const GraphRecord& choose_graph(const hetcomp_step& step, bool adapted) const;
  bool note_adapters(const hetcomp_step& step, std::span<const Adapter* const> adapters);
  void fill_adapters(const Inputs& inputs, const hetcomp_step& step, const GraphRecord& graph) const;
  bool may_stream(const hetcomp_step& step) const;
  const GraphRecord& graph_for(const hetcomp_step& step, std::span<const Adapter* const> adapters);
  void fill_inputs(const Inputs& inputs, const hetcomp_step& step, const GraphRecord& graph,
                   float inverse_temperature) const;
  void find_candidates(const GpuProgramRecord& record, const BufferRecord& buffer, const Inputs& inputs);
  void provide_cache(const hetcomp_step& step);

  CudaDriver driver_;
  ProgramSet programs_;
  const KvPool& pool_;
  std::int32_t max_batch_;
  std::size_t vocab_;
  bool with_cpu_;                                        // which takes part in hand-overs
  std::vector<Inputs> inputs_;                           // by program
  std::unique_ptr<AdapterSlots> adapter_slots_;          // null: no GPU has room for adapters
  std::vector<std::int32_t> adapters_, logit_adapters_;  // slots, by token and by row of logits
  std::vector<std::size_t>
      streamed_without_pairs_;         // the CPU's experts that come to GPUs, whose pairs do not
  std::vector<std::size_t> streamed_;  // its other weights that do
  std::vector<std::uint8_t*> pinned_;  // in the order of hetcomp_step::pinned
  std::span<std::int32_t> best_;
  CandidateRows candidates_;
  const GpuProgram* logits_ = nullptr;  // the program that gives them
};

}  // namespace hetcomp::gpu
