// A step of a model that is computed on a GPU, alone or together with the CPU's program.
#pragma once

#include <cstdint>
#include <filesystem>
#include <functional>
#include <span>
#include <string>
#include <vector>

#include "../candidates.h"
#include "../kv_pool.h"
#include "../manifest.h"
#include "candidate_rows.h"
#include "driver.h"
#include "gpu_program.h"
#include "hetcomp/program.h"

namespace hetcomp::gpu {

class GpuStep {
 public:
  // cpu: the artifact's program for the CPU. Throws Error: what GpuProgram's constructor does, and gpu/
  // does not fit the manifest or the CPU's program.
  // pool: of what the sequences hold of the KV cache; it must live as long.
  GpuStep(const std::filesystem::path& artifact, const Manifest& manifest, const hetcomp_program& cpu,
          const KvPool& pool, const GpuOptions& options);

  // The step with what a program needs beside a GPU, for the lanes to run.
  using Lanes = std::function<void(const hetcomp_step&)>;
  // Runs one step, which has the tokens and the caller's logits (null: not wanted). best: null, or where to
  // put the most likely token of each row of logits, -1 where they are not finite. candidates: null, or
  // asked first, where the graph finds them: the logits may then not be fetched. Returns the batch size of
  // the graph that it ran. One thread at a time. Throws Error as GpuProgram::run does; what `lanes` and the
  // request throw is passed on.
  std::int32_t run(hetcomp_step step, std::int32_t* best, const CandidateRequest* candidates,
                   const Lanes& lanes);

  // Lets experts be copied from the CPU's weights; what ExpertStream::attach returns.
  std::string attach(const HostWeights& weights) { return program_.attach(weights); }
  // Then, attached or not: what GpuProgram::fill_cache does.
  void fill_cache(const HostWeights& weights) { program_.fill_cache(weights); }
  bool streams() const { return program_.streams(); }
  // Null where no experts are cached.
  const ExpertCache* cache() const { return program_.expert_cache(); }
  // Since the last reset; empty: nothing is streamed, or cached.
  std::optional<StreamStatistics> stream_statistics() const {
    if (!program_.streams()) return std::nullopt;
    return program_.expert_stream()->statistics();
  }
  std::optional<CacheStatistics> cache_statistics() const {
    if (cache() == nullptr) return std::nullopt;
    return cache()->statistics();
  }
  void reset_statistics() {
    if (program_.streams()) program_.expert_stream()->reset_statistics();
    if (cache() != nullptr) program_.expert_cache()->reset_statistics();
  }

  bool offers_best() const { return !best_.empty(); }
  bool offers_candidates() const { return !candidates_.empty(); }
  // Whether the GPU computes the logits; else the CPU's program does, into the step's.
  bool gives_logits() const { return gives_logits_; }

  const std::string& name() const { return program_.device().name; }
  std::uint64_t bytes() const { return program_.device_bytes(); }  // of its memory

 private:
  struct Inputs {  // on the host; empty where no kernel reads it
    std::span<std::int32_t> ids, positions, slots, logit_rows, rows, logit_row_count, inverse_temperatures;
  };

  void find_inputs(const ModelFacts& model);
  void check_graphs(const ModelFacts& model) const;
  void find_results(const ModelFacts& model);
  std::span<std::byte> pinned_buffer(const std::string& name) const;
  void check_cache(const ModelFacts& model) const;
  const GraphRecord& choose_graph(const hetcomp_step& step) const;
  void fill_inputs(const hetcomp_step& step, const GraphRecord& graph, float inverse_temperature) const;
  void find_candidates(const BufferRecord& buffer);
  void provide_cache(const hetcomp_step& step);

  CudaDriver driver_;
  GpuProgram program_;
  const KvPool& pool_;
  std::int32_t max_batch_;
  std::size_t vocab_;
  bool has_hand_overs_;
  Inputs inputs_;
  std::vector<std::uint8_t*> pinned_;  // in the order of hetcomp_step::pinned
  std::span<std::int32_t> best_;
  CandidateRows candidates_;
  bool gives_logits_ = false;
};

}  // namespace hetcomp::gpu
