#include <gtest/gtest.h>

#include <cmath>
#include <nlohmann/json.hpp>

#include "expert_counts.h"
#include "status.h"

namespace hetcomp {
namespace {

using Json = nlohmann::json;

// Of two layers with three and four experts, one choice a token.
Routing routing(const std::vector<std::int32_t>& first, const std::vector<std::int32_t>& second) {
  Routing made{first, std::vector<float>(2 * first.size(), 1.0F), 2, 1, {3, 4}};
  made.experts.insert(made.experts.end(), second.begin(), second.end());
  return made;
}

Json counted(const ExpertCounts& counts, std::optional<std::int32_t> slot = std::nullopt) {
  return Json::parse(counts.json(slot));
}

TEST(ExpertCounts, AreThoseOfAllTokensAndOfEachSequence) {
  ExpertCounts counts;
  const std::vector<std::int32_t> slots{0, 5, 0};
  counts.add(routing({1, 1, 1}, {1, 1, 1}), slots);  // nobody counts yet
  counts.begin(0);
  EXPECT_THROW(counts.json(), Error);
  counts.add(routing({0, 1, 2}, {3, 3, 0}), slots);
  counts.add(routing({2}, {0}), std::vector<std::int32_t>{5});
  const Json all = counted(counts);
  EXPECT_EQ(all["frequency"], Json::parse("[[1,1,2],[2,0,0,2]]"));
  EXPECT_EQ(all["tokens"], 4);
  EXPECT_EQ(all["layers"], 2);
  EXPECT_EQ(all["experts"], 3);
  EXPECT_EQ(all["top_k"], 1);
  EXPECT_EQ(counted(counts, 0)["frequency"], Json::parse("[[1,0,1],[1,0,0,1]]"));
  EXPECT_EQ(counted(counts, 5)["frequency"], Json::parse("[[0,1,1],[1,0,0,1]]"));
  EXPECT_THROW(counts.json(1), Error);
  counts.forget(5);
  EXPECT_THROW(counts.json(5), Error);
  counts.stop();
  counts.add(routing({2}, {0}), std::vector<std::int32_t>{0});
  EXPECT_EQ(counted(counts), all);
  counts.reset();
  EXPECT_THROW(counts.json(), Error);
}

TEST(ExpertCounts, AChoiceCountsHalfAfterAsManyTokensOfItsSequence) {
  ExpertCounts counts;
  counts.begin(4);
  counts.add(routing({0}, {0}), std::vector<std::int32_t>{7});
  for (int i = 0; i < 3; ++i) counts.add(routing({1, 2}, {1, 2}), std::vector<std::int32_t>{7, 8});
  const Json all = counted(counts)["frequency"][0], of_seven = counted(counts, 7)["frequency"][0];
  EXPECT_DOUBLE_EQ(all[0], std::exp2(-6 / 4.0));
  EXPECT_DOUBLE_EQ(all[1], std::exp2(-5 / 4.0) + std::exp2(-3 / 4.0) + std::exp2(-1 / 4.0));
  EXPECT_DOUBLE_EQ(of_seven[0], std::exp2(-3 / 4.0));
  EXPECT_EQ(of_seven[2], 0.0);
  // However long it goes on: the units that grow are divided out.
  for (int i = 0; i < 10000; ++i) counts.add(routing({1}, {1}), std::vector<std::int32_t>{7});
  const double limit = 1 / (1 - std::exp2(-1 / 4.0));
  EXPECT_NEAR(counted(counts)["frequency"][0][1].get<double>(), limit, 1e-9);
  EXPECT_EQ(counted(counts)["tokens"], 10007);
}

TEST(ExpertCounts, WhatIsNoExpertIsNotCounted) {
  ExpertCounts counts;
  counts.begin(0);
  counts.add(routing({-1, 3}, {0, 4}), std::vector<std::int32_t>{0, 0});
  EXPECT_EQ(counted(counts)["frequency"], Json::parse("[[0,0,0],[1,0,0,0]]"));
}

}  // namespace
}  // namespace hetcomp
