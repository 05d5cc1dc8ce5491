// The command line of hetcomp-run.
#pragma once

#include <cstdint>
#include <optional>
#include <string>
#include <utility>
#include <vector>

namespace hetcomp::cli {

struct RunOptions {
  std::string artifact;
  std::vector<std::int32_t> ids;
  std::optional<std::string> prompt;
  bool chat = false;

  std::int64_t max_new_tokens = 128;
  double temperature = 0;
  std::int32_t top_k = 0;
  double top_p = 1;
  double min_p = 0;
  double repetition_penalty = 1;
  std::uint64_t seed = 0;
  bool ignore_eos = false;
  std::vector<std::string> stop;

  // Packed adapters by name; the last is the one that answers.
  std::vector<std::pair<std::string, std::string>> adapters;

  std::int32_t threads = 0;
  std::string isa;
  std::int32_t weights = 0;  // hetcomp_weights
  bool verify_weights = true;
  std::vector<std::int32_t> gpus;  // empty: as the artifact says
  bool print_ids = false;
  bool stats = false;
  bool numa_report = false;
};

// Fills `options`. Returns nothing, or the exit code with which to leave (after --help, --version or a
// mistake, which has then been printed).
std::optional<int> parse(int argc, char** argv, RunOptions* options);

}  // namespace hetcomp::cli
