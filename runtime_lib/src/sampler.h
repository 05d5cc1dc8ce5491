// Chooses the next token from logits.
//
// Order as in transformers: repetition penalty, temperature, top-k, top-p, min-p, one draw. Every filter
// keeps at least one token. Candidates are walked from the most to the least likely, equal logits in order of
// their ids, and the draw is one output of std::mt19937_64 (top 53 bits as a fraction), so a seed gives the
// same tokens everywhere where the logits and exp() are the same.
#pragma once

#include <cstdint>
#include <optional>
#include <random>
#include <span>
#include <string>
#include <vector>

#include "candidates.h"

namespace hetcomp {

struct SamplingParams {
  double temperature = 0;         // 0: greedy
  std::int32_t top_k = 0;         // 0: off
  double top_p = 1;               // 1: off
  double min_p = 0;               // 0: off
  double repetition_penalty = 1;  // 1: off

  // Throws Error if a value is out of range.
  void check() const;
};

class Sampler {
 public:
  Sampler(const SamplingParams& params, std::uint64_t seed);  // throws Error

  // Whether the token is the most likely one, whatever else the parameters say.
  bool greedy() const;
  // That token: the one that a device found, -1 where the logits are not finite. Throws Error as sample()
  // does.
  static std::int32_t checked(std::int32_t best);

  // logits: [vocab], overwritten by the repetition penalty; seen: the tokens so far, for that penalty. Throws
  // Error if no logit is a finite maximum (NaN anywhere, all minus infinity, or plus infinity).
  std::int32_t sample(std::span<float> logits, std::span<const std::int32_t> seen);

  // What candidates must be made for: 1 / temperature.
  float inverse_temperature() const;
  // The token that sample() would give for the whole row; nothing, and nothing is drawn, where that cannot be
  // known from the candidates: top-k, top-p or the draw reach beyond them, top-p or the draw lie within the
  // error of their total, or the repetition penalty changes that total or raises other tokens.
  std::optional<std::int32_t> sample(const Candidates& most, std::span<const std::int32_t> seen);

 private:
  struct Total {
    double low;
    double high;
  };
  float penalised(float logit) const;
  void penalise(std::span<float> logits, std::span<const std::int32_t> seen);
  void penalise_candidates(std::span<const std::int32_t> seen, float least);
  double lowest(float largest) const;
  void collect(std::span<const float> logits, float largest);
  std::optional<std::size_t> kept_by_top_p(const Total& total) const;
  // all: of the weights of all tokens; none: the candidates are all.
  std::optional<std::int32_t> draw(const std::optional<Total>& all);

  SamplingParams params_;
  std::mt19937_64 random_;
  std::optional<double> fraction_;     // drawn, but no token was chosen with it
  std::vector<Candidate> candidates_;  // from the most to the least likely
  std::vector<double> weights_;        // of them, relative to the most likely
  std::vector<bool> penalised_;
};

}  // namespace hetcomp
