#include "sampler.h"

#include <algorithm>
#include <cmath>

#include "status.h"

namespace hetcomp {
namespace {

void require(bool good, const char* sentence) {
  if (!good) throw Error(HETCOMP_INVALID_ARGUMENT, sentence);
}

[[noreturn]] void refuse_not_finite() {
  throw Error(HETCOMP_COMPUTE, "The logits are not finite: the weights are damaged or the format overflows.");
}

// The largest logit and the first id that has it.
std::size_t arg_max(std::span<const float> logits) {
  std::size_t best = 0;
  bool nan = false;
  for (std::size_t i = 0; i < logits.size(); ++i) {
    nan |= std::isnan(logits[i]);
    if (logits[i] > logits[best]) best = i;
  }
  if (nan || !std::isfinite(logits[best])) refuse_not_finite();
  return best;
}

}  // namespace

void SamplingParams::check() const {
  require(std::isfinite(temperature) && temperature >= 0, "The temperature must be 0 (greedy) or larger.");
  require(top_k >= 0, "top_k must be 0 (off) or larger.");
  require(top_p > 0 && top_p <= 1, "top_p must be larger than 0 and at most 1 (off).");
  require(min_p >= 0 && min_p <= 1, "min_p must be from 0 (off) to 1.");
  require(std::isfinite(repetition_penalty) && repetition_penalty > 0,
          "The repetition penalty must be larger than 0 (1 is off).");
}

Sampler::Sampler(const SamplingParams& params, std::uint64_t seed) : params_(params), random_(seed) {
  params_.check();
}

bool Sampler::greedy() const {
  return params_.repetition_penalty == 1 && (params_.temperature == 0 || params_.top_k == 1);
}

std::int32_t Sampler::checked(std::int32_t best) {
  if (best < 0) refuse_not_finite();
  return best;
}

std::int32_t Sampler::sample(std::span<float> logits, std::span<const std::int32_t> seen) {
  if (params_.repetition_penalty != 1) penalise(logits, seen);
  const std::size_t best = arg_max(logits);
  if (params_.temperature == 0 || params_.top_k == 1) return static_cast<std::int32_t>(best);
  collect(logits, logits[best]);
  return draw(logits[best]);
}

// A token counts once, however often it was seen.
void Sampler::penalise(std::span<float> logits, std::span<const std::int32_t> seen) {
  penalised_.assign(logits.size(), false);
  const auto penalty = static_cast<float>(params_.repetition_penalty);
  for (const std::int32_t id : seen) {
    const auto i = static_cast<std::size_t>(id);
    if (penalised_[i]) continue;
    penalised_[i] = true;
    logits[i] = logits[i] > 0 ? logits[i] / penalty : logits[i] * penalty;
  }
}

// The tokens that top-k and min-p leave, sorted. min-p compares with the most likely token, so it can go
// before top-p unless the candidates' total is needed: top-p counts the tokens that min-p will remove.
void Sampler::collect(std::span<const float> logits, float largest) {
  // exp((logit - largest) / temperature) is 0 in double below this; such a token is never drawn.
  const double least = params_.top_p < 1 || params_.min_p == 0 ? -746 : std::log(params_.min_p);
  const double lowest = static_cast<double>(largest) + least * params_.temperature;
  candidates_.clear();
  for (std::size_t i = 0; i < logits.size(); ++i)
    if (static_cast<double>(logits[i]) >= lowest)
      candidates_.push_back({logits[i], static_cast<std::int32_t>(i)});
  const auto before = [](const Candidate& a, const Candidate& b) {
    return a.logit != b.logit ? a.logit > b.logit : a.id < b.id;
  };
  const auto k = static_cast<std::size_t>(params_.top_k);
  if (k > 0 && k < candidates_.size()) {
    std::ranges::nth_element(candidates_, candidates_.begin() + params_.top_k, before);
    candidates_.resize(k);
  }
  std::ranges::sort(candidates_, before);
}

std::int32_t Sampler::draw(float largest) {
  std::vector<double> weights;
  weights.reserve(candidates_.size());
  double total = 0;
  for (const Candidate& candidate : candidates_) {
    const double difference = static_cast<double>(candidate.logit) - static_cast<double>(largest);
    weights.push_back(std::exp(difference / params_.temperature));
    total += weights.back();
  }
  std::size_t kept = weights.size();
  if (params_.top_p < 1) {
    // The smallest set whose probability reaches top_p.
    double reached = 0;
    kept = 0;
    while (kept < weights.size() && reached < params_.top_p * total) reached += weights[kept++];
  }
  // weights[0] is 1, so a weight is the ratio to the most likely token.
  while (kept > 1 && weights[kept - 1] < params_.min_p) --kept;

  double sum = 0;
  for (std::size_t i = 0; i < kept; ++i) sum += weights[i];
  const double point = static_cast<double>(random_() >> 11) * 0x1p-53 * sum;
  double passed = 0;
  for (std::size_t i = 0; i < kept; ++i) {
    passed += weights[i];
    if (point < passed) return candidates_[i].id;
  }
  return candidates_[kept - 1].id;
}

}  // namespace hetcomp
