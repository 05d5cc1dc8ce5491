// Chooses the next token from logits.
//
// Order as in transformers: repetition penalty, temperature, top-k, top-p, min-p, one draw. Every filter
// keeps at least one token. Candidates are walked from the most to the least likely, equal logits in order of
// their ids, and the draw is one output of std::mt19937_64 (top 53 bits as a fraction), so a seed gives the
// same tokens everywhere where the logits and exp() are the same.
#pragma once

#include <cstdint>
#include <random>
#include <span>
#include <string>
#include <vector>

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

 private:
  struct Candidate {
    float logit;
    std::int32_t id;
  };
  void penalise(std::span<float> logits, std::span<const std::int32_t> seen);
  void collect(std::span<const float> logits, float largest);
  std::int32_t draw(float largest);

  SamplingParams params_;
  std::mt19937_64 random_;
  std::vector<Candidate> candidates_;
  std::vector<bool> penalised_;
};

}  // namespace hetcomp
