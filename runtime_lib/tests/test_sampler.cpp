#include <gtest/gtest.h>

#include <algorithm>
#include <cmath>
#include <limits>
#include <map>
#include <numeric>

#include "sampler.h"
#include "status.h"

namespace hetcomp {
namespace {

constexpr float kInfinity = std::numeric_limits<float>::infinity();

std::vector<float> random_logits(std::size_t n, std::uint32_t seed) {
  std::mt19937 random(seed);
  std::normal_distribution<float> normal(0, 3);
  std::vector<float> logits(n);
  for (float& logit : logits) logit = normal(random);
  return logits;
}

std::int32_t sample_once(const SamplingParams& params, std::vector<float> logits,
                         std::vector<std::int32_t> seen = {}) {
  return Sampler(params, 0).sample(logits, seen);
}

// The distribution step by step as transformers computes it: each filter sets logits to minus infinity.
std::vector<double> softmax(const std::vector<double>& logits) {
  const double largest = *std::ranges::max_element(logits);
  std::vector<double> p;
  for (const double logit : logits) p.push_back(std::exp(logit - largest));
  const double sum = std::accumulate(p.begin(), p.end(), 0.0);
  for (double& value : p) value /= sum;
  return p;
}

std::vector<double> reference(const SamplingParams& params, const std::vector<float>& logits,
                              const std::vector<std::int32_t>& seen) {
  std::vector<double> x(logits.begin(), logits.end());
  std::vector<bool> done(x.size());
  for (const std::int32_t id : seen) {
    const auto i = static_cast<std::size_t>(id);
    if (!done[i]) x[i] = x[i] < 0 ? x[i] * params.repetition_penalty : x[i] / params.repetition_penalty;
    done[i] = true;
  }
  for (double& value : x) value /= params.temperature;
  if (params.top_k > 0) {
    std::vector<double> sorted = x;
    std::ranges::sort(sorted, std::greater<>());
    const double least = sorted[std::min(static_cast<std::size_t>(params.top_k), x.size()) - 1];
    for (double& value : x)
      if (value < least) value = -HUGE_VAL;
  }
  if (params.top_p < 1) {
    const std::vector<double> p = softmax(x);
    std::vector<std::size_t> order(x.size());
    std::iota(order.begin(), order.end(), std::size_t{0});
    std::ranges::stable_sort(order, std::greater<>(), [&](std::size_t i) { return p[i]; });
    double before = 0;
    for (const std::size_t i : order) {
      if (before >= params.top_p) x[i] = -HUGE_VAL;
      before += p[i];
    }
  }
  const std::vector<double> p = softmax(x);
  const double most = *std::ranges::max_element(p);
  for (std::size_t i = 0; i < x.size(); ++i)
    if (p[i] < params.min_p * most) x[i] = -HUGE_VAL;
  return softmax(x);
}

TEST(Sampler, GreedyIsTheFirstOfTheLargest) {
  EXPECT_EQ(sample_once({}, {1, 3, 2, 3}), 1);
  EXPECT_EQ(sample_once({}, {-kInfinity, -5}), 1);
  EXPECT_EQ(sample_once({.temperature = 2, .top_k = 1}, {1, 3, 2, 3}), 1);
}

TEST(Sampler, RepetitionPenaltyCountsATokenOnce) {
  EXPECT_EQ(sample_once({.repetition_penalty = 2}, {4, 3, 1}, {0, 0}), 1);
  EXPECT_EQ(sample_once({.repetition_penalty = 1.25}, {4, 3, 1}, {0, 0, 0, 0}), 0);
  EXPECT_EQ(sample_once({.repetition_penalty = 2}, {-1, -1.5, -3}, {0}), 1);  // negative logits grow
}

class Distribution : public testing::TestWithParam<SamplingParams> {};
INSTANTIATE_TEST_SUITE_P(Params, Distribution,
                         testing::Values(SamplingParams{.temperature = 1}, SamplingParams{.temperature = 0.5},
                                         SamplingParams{.temperature = 2, .top_k = 5},
                                         SamplingParams{.temperature = 1, .top_p = 0.7},
                                         SamplingParams{.temperature = 1.5, .min_p = 0.1},
                                         SamplingParams{.temperature = 1.3,
                                                        .top_k = 9,
                                                        .top_p = 0.9,
                                                        .min_p = 0.05,
                                                        .repetition_penalty = 1.5}));

// Frequencies of many draws against the reference: chi-square at a level that a right sampler fails once in
// 10^6.
TEST_P(Distribution, MatchesTheReference) {
  const std::vector<float> logits = random_logits(24, 7);
  const std::vector<std::int32_t> seen{1, 1, 4};
  const std::vector<double> p = reference(GetParam(), logits, seen);
  constexpr int kDraws = 40000;
  std::map<std::int32_t, int> counts;
  Sampler sampler(GetParam(), 123);
  for (int i = 0; i < kDraws; ++i) {
    std::vector<float> copy = logits;
    ++counts[sampler.sample(copy, seen)];
  }
  double chi_square = 0;
  double degrees = -1;
  double rare = 0;  // categories too small for the test are put together
  int rare_count = 0;
  for (std::size_t i = 0; i < p.size(); ++i) {
    const int count = counts[static_cast<std::int32_t>(i)];
    if (p[i] == 0) {
      EXPECT_EQ(count, 0) << "token " << i << " was filtered out";
    } else if (p[i] * kDraws < 10) {
      rare += p[i] * kDraws;
      rare_count += count;
    } else {
      chi_square += (count - p[i] * kDraws) * (count - p[i] * kDraws) / (p[i] * kDraws);
      ++degrees;
    }
  }
  if (rare > 0) chi_square += (rare_count - rare) * (rare_count - rare) / std::max(rare, 1.0);
  // Wilson and Hilferty's approximation of the quantile at 4.75 standard deviations.
  const double k = std::max(degrees + 1, 1.0);
  const double limit = k * std::pow(1 - 2 / (9 * k) + 4.75 * std::sqrt(2 / (9 * k)), 3);
  EXPECT_LT(chi_square, limit);
}

TEST(Sampler, SameSeedSameTokens) {
  const SamplingParams params{.temperature = 1, .top_p = 0.95};
  const auto draw = [&](std::uint64_t seed) {
    Sampler sampler(params, seed);
    std::vector<std::int32_t> ids;
    for (std::uint32_t i = 0; i < 50; ++i) {
      std::vector<float> logits = random_logits(1000, i);
      ids.push_back(sampler.sample(logits, ids));
    }
    return ids;
  };
  EXPECT_EQ(draw(1), draw(1));
  EXPECT_NE(draw(1), draw(2));
}

TEST(Sampler, FiltersKeepAtLeastOneToken) {
  EXPECT_EQ(sample_once({.temperature = 1, .top_p = 1e-9}, {0, 2, 1}), 1);
  EXPECT_EQ(sample_once({.temperature = 1, .min_p = 1}, {0, 2, 1}), 1);
  EXPECT_EQ(sample_once({.temperature = 1e-6}, {0, 2, 1.999F}), 1);
}

TEST(Sampler, RefusesLogitsThatAreNotFinite) {
  const float nan = std::nanf("");
  for (const SamplingParams& params : {SamplingParams{}, SamplingParams{.temperature = 1}}) {
    EXPECT_THROW(sample_once(params, {0, nan, 1}), Error);
    EXPECT_THROW(sample_once(params, {nan, 0}), Error);
    EXPECT_THROW(sample_once(params, {0, kInfinity}), Error);
    EXPECT_THROW(sample_once(params, {-kInfinity, -kInfinity}), Error);
  }
}

TEST(Sampler, RefusesParametersOutOfRange) {
  const double nan = std::nan("");
  for (const SamplingParams& params :
       {SamplingParams{.temperature = -1}, SamplingParams{.temperature = nan}, SamplingParams{.top_k = -1},
        SamplingParams{.top_p = 0}, SamplingParams{.top_p = 1.5}, SamplingParams{.top_p = nan},
        SamplingParams{.min_p = -0.1}, SamplingParams{.min_p = 2}, SamplingParams{.repetition_penalty = 0},
        SamplingParams{.repetition_penalty = nan}})
    EXPECT_THROW(Sampler(params, 0), Error);
}

}  // namespace
}  // namespace hetcomp
