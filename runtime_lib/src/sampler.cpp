#include "sampler.h"

#include <algorithm>
#include <cmath>
#include <numeric>

#include "candidate_order.h"
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
  return draw(std::nullopt).value();
}

float Sampler::inverse_temperature() const {
  return params_.temperature > 0 ? static_cast<float>(1 / params_.temperature) : 1;
}

// Tokens that are no candidates are less likely than all candidates, with a penalty of at least 1 as well.
std::optional<std::int32_t> Sampler::sample(const Candidates& most, std::span<const std::int32_t> seen) {
  if (params_.repetition_penalty < 1) return std::nullopt;
  candidates_.assign(most.tokens.begin(), most.tokens.end());
  if (params_.repetition_penalty != 1) penalise_candidates(seen, most.least);
  if (candidates_.empty()) return std::nullopt;
  std::ranges::sort(candidates_, more_likely);
  if (!std::isfinite(candidates_.front().logit)) return std::nullopt;
  if (params_.temperature == 0 || params_.top_k == 1) return candidates_.front().id;
  const double end = lowest(candidates_.front().logit);
  while (static_cast<double>(candidates_.back().logit) < end) candidates_.pop_back();
  const auto k = static_cast<std::size_t>(params_.top_k);
  const bool all = static_cast<double>(most.least) <= end || (k > 0 && k <= candidates_.size());
  if (k > 0 && k < candidates_.size()) candidates_.resize(k);
  if (all) return draw(std::nullopt);
  if (k > 0 || params_.repetition_penalty != 1 || (params_.top_p == 1 && params_.min_p > 0))
    return std::nullopt;
  if (!std::isfinite(most.total)) return std::nullopt;  // a temperature near 0
  return draw(Total{most.total * (1 - kTotalError), most.total * (1 + kTotalError)});
}

float Sampler::penalised(float logit) const {
  const auto penalty = static_cast<float>(params_.repetition_penalty);
  return logit > 0 ? logit / penalty : logit * penalty;
}

// A token counts once, however often it was seen.
void Sampler::penalise(std::span<float> logits, std::span<const std::int32_t> seen) {
  penalised_.assign(logits.size(), false);
  for (const std::int32_t id : seen) {
    const auto i = static_cast<std::size_t>(id);
    if (penalised_[i]) continue;
    penalised_[i] = true;
    logits[i] = penalised(logits[i]);
  }
}

// Candidates that fall below `least` are dropped: others may come before them now.
void Sampler::penalise_candidates(std::span<const std::int32_t> seen, float least) {
  std::int32_t end = 0;
  for (const Candidate& candidate : candidates_) end = std::max(end, candidate.id + 1);
  penalised_.assign(static_cast<std::size_t>(end), false);
  for (const std::int32_t id : seen)
    if (id < end) penalised_[static_cast<std::size_t>(id)] = true;
  for (Candidate& candidate : candidates_)
    if (penalised_[static_cast<std::size_t>(candidate.id)]) candidate.logit = penalised(candidate.logit);
  std::erase_if(candidates_, [&](const Candidate& candidate) { return !(candidate.logit >= least); });
}

// The smallest logit that can be drawn. min-p compares with the most likely token, so it can go before top-p
// unless the candidates' total is needed: top-p counts the tokens that min-p will remove.
double Sampler::lowest(float largest) const {
  // exp((logit - largest) / temperature) is 0 in double below this; such a token is never drawn.
  const double least = params_.top_p < 1 || params_.min_p == 0 ? -746 : std::log(params_.min_p);
  return static_cast<double>(largest) + least * params_.temperature;
}

// The tokens that top-k and min-p leave, sorted.
void Sampler::collect(std::span<const float> logits, float largest) {
  const double end = lowest(largest);
  candidates_.clear();
  for (std::size_t i = 0; i < logits.size(); ++i)
    if (static_cast<double>(logits[i]) >= end)
      candidates_.push_back({logits[i], static_cast<std::int32_t>(i)});
  const auto k = static_cast<std::size_t>(params_.top_k);
  if (k > 0 && k < candidates_.size()) {
    std::ranges::nth_element(candidates_, candidates_.begin() + params_.top_k, more_likely);
    candidates_.resize(k);
    std::ranges::sort(candidates_, more_likely);
  } else {
    sort_by_likelihood(candidates_);
  }
}

// The size of the smallest set whose probability reaches top_p; none where that depends on which total within
// its bounds is the right one.
std::optional<std::size_t> Sampler::kept_by_top_p(const Total& total) const {
  double reached = 0;
  double last = 0;
  std::size_t kept = 0;
  while (kept < weights_.size() && reached < params_.top_p * total.high) {
    last = reached;
    reached += weights_[kept++];
  }
  if (reached < params_.top_p * total.high || last >= params_.top_p * total.low) return std::nullopt;
  return kept;
}

std::optional<std::int32_t> Sampler::draw(const std::optional<Total>& all) {
  weights_.clear();
  double mass = 0;
  for (const Candidate& candidate : candidates_) {
    const double difference =
        static_cast<double>(candidate.logit) - static_cast<double>(candidates_.front().logit);
    weights_.push_back(std::exp(difference / params_.temperature));
    mass += weights_.back();
  }
  const Total total = all ? Total{std::max(mass, all->low), all->high} : Total{mass, mass};
  if (total.high < mass) return std::nullopt;
  std::size_t kept = weights_.size();
  if (params_.top_p < 1) {
    const std::optional<std::size_t> found = kept_by_top_p(total);
    if (!found) return std::nullopt;
    kept = *found;
  }
  // weights_[0] is 1, so a weight is the ratio to the most likely token.
  while (kept > 1 && weights_[kept - 1] < params_.min_p) --kept;

  Total sum = total;
  if (params_.top_p < 1 || !all) {
    const double exact = std::accumulate(weights_.begin(), weights_.begin() + static_cast<long>(kept), 0.0);
    sum = {exact, exact};
  }
  if (!fraction_) fraction_ = static_cast<double>(random_() >> 11) * 0x1p-53;
  std::optional<std::size_t> chosen;
  double passed = 0;
  for (std::size_t i = 0; i < kept && !chosen; ++i) {
    passed += weights_[i];
    if (*fraction_ * sum.low < passed) chosen = i;
  }
  // Beyond the last by rounding, or among tokens that are no candidates.
  if (!chosen && sum.low == sum.high) chosen = kept - 1;
  if (!chosen || (sum.low < sum.high && *fraction_ * sum.high >= passed)) return std::nullopt;
  fraction_.reset();
  return candidates_[*chosen].id;
}

}  // namespace hetcomp
