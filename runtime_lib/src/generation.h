// Generates tokens one step at a time.
#pragma once

#include <cstdint>
#include <optional>
#include <span>
#include <string>
#include <vector>

#include "hetcomp/hetcomp.h"
#include "sampler.h"
#include "session.h"
#include "stop_strings.h"
#include "tokenizer.h"

namespace hetcomp {

struct GenerateParams {
  std::int64_t max_new_tokens = 256;
  SamplingParams sampling;
  std::uint64_t seed = 0;
  bool ignore_eos = false;
  std::vector<std::string> stop;
};

struct GeneratedToken {
  std::int32_t id = -1;
  hetcomp_finish finish = HETCOMP_FINISH_NONE;
  std::string text;
};

class Generation {
 public:
  // The prompt is appended to the session's tokens. Throws Error.
  Generation(Session& session, std::span<const std::int32_t> prompt, const GenerateParams& params);

  // Computes one step: a piece of the prompt (id -1) or a token. Throws Error.
  const GeneratedToken& next();

 private:
  bool advance();  // feeds the next piece; true: what follows the last token is there
  std::int32_t next_id();
  bool choose(const Candidates& candidates, std::span<const std::int32_t> step_ids);
  hetcomp_finish finish_of(std::int32_t id) const;
  void add_text();

  Session& session_;
  const GenerateParams params_;
  std::vector<std::int32_t> pending_;  // tokens not yet computed
  std::size_t fed_ = 0;
  std::int64_t generated_ = 0;
  Sampler sampler_;
  StopStrings stops_;
  std::optional<StreamDecoder> decoder_;
  const bool greedy_;  // the model finds the next token itself: best_; else logits_ has the logits
  std::int32_t best_ = -1;
  std::optional<std::int32_t> chosen_;  // among the candidates of the step
  Memory logits_;
  GeneratedToken token_;
};

}  // namespace hetcomp
