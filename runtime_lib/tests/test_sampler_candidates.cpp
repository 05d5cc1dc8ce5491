// Sampling from the most likely tokens: the same tokens as from whole rows, or none.
#include <gtest/gtest.h>

#include <algorithm>
#include <cmath>
#include <functional>

#include "candidate_order.h"
#include "sampler.h"

namespace hetcomp {
namespace {

using Tokens = std::vector<std::int32_t>;

// A row; some have many equal logits, some few tokens that matter, some hardly any that do not.
std::vector<float> random_row(std::mt19937& random) {
  std::normal_distribution<float> normal(0, std::uniform_real_distribution<float>(0.3F, 6)(random));
  const bool ties = random() % 3 == 0;
  std::vector<float> row(500 + random() % 1500);
  for (float& logit : row) logit = ties ? std::round(normal(random) * 4) / 4 : normal(random);
  if (random() % 4 == 0)
    for (std::size_t i = 0; i < row.size(); i += 3) row[i] = -HUGE_VALF;
  return row;
}

// What a GPU would find: the tokens from the bound that `wanted` tokens reach on, in any order, and a total
// that is off by at most the bound of its error.
struct Found {
  Found(const std::vector<float>& row, std::size_t wanted, double temperature, double off) {
    std::vector<float> sorted = row;
    std::ranges::sort(sorted, std::greater<>());
    least = sorted[wanted - 1];
    for (std::size_t i = row.size(); i-- > 0;)
      if (row[i] >= least) tokens.push_back({row[i], static_cast<std::int32_t>(i)});
    for (const float logit : row)
      total += std::exp((static_cast<double>(logit) - static_cast<double>(sorted[0])) / temperature);
    total *= 1 + off;
  }
  Candidates candidates() const { return {tokens, least, total}; }

  std::vector<Candidate> tokens;
  float least = 0;
  double total = 0;
};

// Shares of the rows for which the candidates gave a token; that every token is the whole row's is asserted.
double share_chosen(const SamplingParams& params, std::size_t wanted, std::uint32_t seed) {
  constexpr int kRows = 250;
  std::mt19937 random(seed);
  Sampler whole(params, seed);
  Sampler most(params, seed);
  int chosen = 0;
  for (int i = 0; i < kRows; ++i) {
    const std::vector<float> row = random_row(random);
    const double temperature = params.temperature > 0 ? params.temperature : 1;
    const double off = kTotalError / 2 * (static_cast<int>(random() % 3) - 1);
    const Found found(row, wanted, temperature, off);
    Tokens ids;
    for (int s = 0; s < 4; ++s) {
      ids.push_back(found.tokens[random() % found.tokens.size()].id);
      ids.push_back(static_cast<std::int32_t>(random() % row.size()));
    }
    std::vector<float> copy = row;
    const std::int32_t want = whole.sample(copy, ids);
    copy = row;
    const std::optional<std::int32_t> got = most.sample(found.candidates(), ids);
    EXPECT_EQ(got ? *got : most.sample(copy, ids), want) << "row " << i;
    chosen += got ? 1 : 0;
    if (testing::Test::HasFailure()) break;
  }
  return static_cast<double>(chosen) / kRows;
}

struct Case {
  SamplingParams params;
  double least_share;
};

class SampledFromCandidates : public testing::TestWithParam<Case> {};
INSTANTIATE_TEST_SUITE_P(
    Params, SampledFromCandidates,
    testing::Values(Case{{.temperature = 0.7, .top_k = 20, .top_p = 0.8}, 1},
                    Case{{.temperature = 0.6, .top_k = 20, .top_p = 0.95, .repetition_penalty = 1.1}, 0.7},
                    Case{{.temperature = 1.2, .top_k = 40, .min_p = 0.05}, 1},
                    Case{{.temperature = 1, .top_p = 0.9}, 0.3},
                    Case{{.temperature = 0.5, .top_p = 0.5}, 0.5},
                    Case{{.temperature = 1, .top_p = 0.7, .min_p = 0.02}, 0.3},
                    Case{{.temperature = 0.8, .min_p = 0.2}, 0.5}, Case{{.temperature = 1}, 0.4},
                    Case{{.temperature = 0.3}, 0.7}, Case{{.temperature = 1.5, .top_k = 90}, 0},
                    Case{{.repetition_penalty = 1.3}, 0.9},
                    Case{{.temperature = 1, .repetition_penalty = 0.8}, 0}));

TEST_P(SampledFromCandidates, TheSameTokensAsFromWholeRows) {
  for (std::uint32_t seed = 1; seed <= 2; ++seed)
    EXPECT_GE(share_chosen(GetParam().params, 64, seed), GetParam().least_share);
}

TEST(CandidateOrder, IsThatOfAComparison) {
  std::mt19937 random(5);
  for (int round = 0; round < 20; ++round) {
    std::vector<float> row = random_row(random);
    row[7] = 0;
    row[3] = -0.0F;
    row[5] = HUGE_VALF;
    std::vector<Candidate> candidates;
    for (const float logit : row) candidates.push_back({logit, static_cast<std::int32_t>(candidates.size())});
    std::vector<Candidate> compared = candidates;
    std::ranges::sort(compared, more_likely);
    sort_by_likelihood(candidates);
    EXPECT_TRUE(std::ranges::equal(candidates, compared, {}, &Candidate::id, &Candidate::id));
  }
}

TEST(SamplerCandidates, APenaltyThatLeavesNoneIsLeftToTheRow) {
  const std::vector<Candidate> tokens{{5, 1}, {4.9F, 2}};
  Sampler sampler({.repetition_penalty = 2}, 0);
  const Tokens seen{1, 2};
  EXPECT_EQ(sampler.sample(Candidates{tokens, 4.8F, 2}, seen), std::nullopt);
}

TEST(SamplerCandidates, ATotalThatIsNotFiniteIsNoTotal) {
  const std::vector<Candidate> tokens{{5, 1}, {4.9F, 2}};
  Sampler sampler({.temperature = 1, .top_p = 0.5}, 0);
  EXPECT_EQ(sampler.sample(Candidates{tokens, 4.8F, std::nan("")}, {}), std::nullopt);
}

TEST(SamplerCandidates, WhatFallsBelowTheBoundIsNoCandidate) {
  const std::vector<Candidate> tokens{{5, 1}, {4, 2}};
  Sampler sampler({.temperature = 1, .top_k = 2, .repetition_penalty = 2}, 0);
  // Token 1 falls to 2.5, and a token of 3.9 may be the second.
  EXPECT_EQ(sampler.sample(Candidates{tokens, 4, 2}, Tokens{1}), std::nullopt);
}

}  // namespace
}  // namespace hetcomp
