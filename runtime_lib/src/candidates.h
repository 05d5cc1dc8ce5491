// The most likely tokens of a row of logits, and what is known of all others.
#pragma once

#include <cstdint>
#include <functional>
#include <span>

namespace hetcomp {

struct Candidate {
  float logit;
  std::int32_t id;
};

struct Candidates {
  std::span<const Candidate> tokens;  // every token whose logit is at least `least`, in any order
  float least;
  // Sum over the whole row of exp((logit - largest) * inverse temperature), in f32.
  double total;
};

// Relative bound of the error of Candidates::total. A term's: 5 roundings of 2^-24 times its exponent x, and
// 2^-22 of the exponential. V terms e^-x beside the 1 of the largest make V x e^-x / (1 + V e^-x) < 12 of x
// for V up to 2^18, so 4e-6; the sums add 20 roundings, 1e-6.
inline constexpr double kTotalError = 2e-5;

// A step that is asked for candidates: of its first row, if the graph that it runs finds them.
struct CandidateRequest {
  float inverse_temperature;  // larger than 0
  // Called before the step gives the model free; true: a token was chosen and no logits are wanted.
  std::function<bool(const Candidates&)> choose;
};

}  // namespace hetcomp
