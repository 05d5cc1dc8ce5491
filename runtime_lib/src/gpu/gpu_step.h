// A step of a model that is computed on GPUs, alone or together with the CPU's program.
#pragma once

#include <cstdint>
#include <filesystem>
#include <functional>
#include <optional>
#include <span>
#include <string>
#include <vector>

#include "../manifest.h"
#include "driver.h"
#include "hetcomp/program.h"
#include "program_set.h"

namespace hetcomp::gpu {

class GpuStep {
 public:
  // cpu: the artifact's program for the CPU. Throws Error: what ProgramSet's constructor does, and gpu/ does
  // not fit the manifest or the CPU's program.
  GpuStep(const std::filesystem::path& artifact, const Manifest& manifest, const hetcomp_program& cpu,
          const GpuOptions& options);

  // The step with what a program needs beside a GPU, for the lanes to run.
  using Lanes = std::function<void(const hetcomp_step&)>;
  // Runs one step, which has the tokens and the caller's logits (null: not wanted). best: null, or where to
  // put the most likely token of each row of logits, -1 where they are not finite. Returns the batch size of
  // the graph that it ran. One thread at a time. Throws Error as ProgramSet::run does; what `lanes` throws is
  // passed on.
  std::int32_t run(hetcomp_step step, std::int32_t* best, const Lanes& lanes);

  bool offers_best() const { return !best_.empty(); }
  // Whether a GPU computes the logits; else the CPU's program does, into the step's.
  bool gives_logits() const { return logits_ != nullptr; }

  const ProgramSet& programs() const { return programs_; }

 private:
  struct Place {
    std::int32_t slot;
    std::int32_t position;
  };
  struct Inputs {  // of a GPU, on the host; empty where no kernel reads it
    std::span<std::int32_t> ids, positions, slots, logit_rows, rows, logit_row_count;
  };

  Inputs find_inputs(const GpuProgram& program, const ModelFacts& model) const;
  void check_graphs(const ModelFacts& model) const;
  void find_results(const GpuProgram& program, const ModelFacts& model);
  std::span<std::byte> pinned_buffer(const std::string& name) const;
  std::optional<Place> padding_place(const hetcomp_step& step) const;
  const GraphRecord& choose_graph(const hetcomp_step& step, bool may_pad) const;
  static void fill_inputs(const Inputs& inputs, const hetcomp_step& step, const GraphRecord& graph,
                          const std::optional<Place>& padding);

  CudaDriver driver_;
  ProgramSet programs_;
  std::int32_t max_batch_;
  std::size_t vocab_;
  bool with_cpu_;                      // which takes part in hand-overs
  std::vector<Inputs> inputs_;         // by program
  std::vector<std::uint8_t*> pinned_;  // in the order of hetcomp_step::pinned
  std::span<std::int32_t> best_;
  const GpuProgram* logits_ = nullptr;  // the program that gives them
};

}  // namespace hetcomp::gpu
