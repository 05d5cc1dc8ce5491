#include <gtest/gtest.h>

#include <random>
#include <set>

#include "gpu/cache_policy.h"

namespace hetcomp::gpu {
namespace {

constexpr std::uint64_t kExpertBytes = 100;
constexpr std::uint64_t kPlenty = 1 << 20;

CachePolicy policy_of(CacheRule rule, std::int32_t experts, std::int32_t slots,
                      std::uint64_t bytes_per_step = kPlenty, std::size_t layers = 1,
                      std::int32_t top_k = 1) {
  CachePolicy policy(rule, std::vector<CachedLayer>(layers, {experts, top_k, kExpertBytes}), slots,
                     bytes_per_step);
  for (std::size_t layer = 0; layer < layers; ++layer)
    for (std::int32_t e = 0; e < slots; ++e) policy.place(layer, e, e);
  return policy;
}

// A step of decoding in which a token chose those experts of layer 0; the copies before it succeed.
std::vector<CacheArrival> decode(CachePolicy& policy, const std::vector<std::int32_t>& ids) {
  const std::vector<CacheArrival> arrivals = policy.choose();
  policy.begin_step(1, true);
  policy.count(0, ids);
  policy.arrived(true);
  return arrivals;
}

bool holds(const CachePolicy& policy, std::int32_t expert) {
  return policy.slots(0)[static_cast<std::size_t>(expert)] != CachePolicy::kNone;
}

TEST(CachePolicy, LruTakesTheSlotThatWasUsedLongestAgo) {
  CachePolicy policy = policy_of(CacheRule::kLru, 4, 2);
  for (int i = 0; i < 10; ++i) decode(policy, {(i + 1) % 2});  // 0 is used last
  for (std::int64_t i = 1; i < CachePolicy::kLruMargin; ++i) EXPECT_TRUE(decode(policy, {3}).empty());
  const auto arrivals = decode(policy, {3});
  ASSERT_EQ(arrivals.size(), 1U);
  EXPECT_EQ(arrivals[0].expert, 3);
  EXPECT_EQ(arrivals[0].slot, 1);
  EXPECT_TRUE(holds(policy, 0) && holds(policy, 3) && !holds(policy, 1));
}

TEST(CachePolicy, LfuKeepsWhatIsUsedOftenThoughItWasNotLately) {
  CachePolicy policy = policy_of(CacheRule::kLfu, 4, 1);
  for (int i = 0; i < 20; ++i) decode(policy, {0});
  for (int i = 0; i < 15; ++i) EXPECT_TRUE(decode(policy, {i % 2 + 1}).empty());
  EXPECT_TRUE(holds(policy, 0));
}

TEST(CachePolicy, LfuForgetsWithItsHalfLife) {
  CachePolicy policy = policy_of(CacheRule::kLfu, 4, 1);
  for (int i = 0; i < 200; ++i) decode(policy, {0});
  int steps = 0;
  while (!holds(policy, 2) && steps < 1000) {
    decode(policy, {2});
    ++steps;
  }
  // 200 uses of 0 count a 2^(-steps / 256) of themselves; 2 needs 1.25 times as many.
  EXPECT_GT(steps, 50);
  EXPECT_LT(steps, 200);
}

TEST(CachePolicy, UnitsOfUsesDoNotOverflow) {
  CachePolicy policy = policy_of(CacheRule::kLfu, 4, 1);
  std::vector<std::int32_t> prompt(4096, 1);
  for (int i = 0; i < 200; ++i) {  // 3,200 half-lives
    policy.begin_step(4096, false);
    policy.count(0, prompt);
  }
  EXPECT_EQ(decode(policy, {2}).size(), 1U);
  EXPECT_TRUE(holds(policy, 1));
}

TEST(CachePolicy, APromptWarmsTheCache) {
  for (const CacheRule rule : {CacheRule::kLru, CacheRule::kLfu}) {
    CachePolicy policy = policy_of(rule, 8, 2);
    std::vector<std::int32_t> prompt;
    for (int i = 0; i < 64; ++i) prompt.push_back(i % 2 + 4);
    policy.begin_step(64, false);
    policy.count(0, prompt);
    decode(policy, {4});
    EXPECT_TRUE(holds(policy, 4) && holds(policy, 5));
  }
}

TEST(CachePolicy, WhatTheLastStepHasUsedStays) {
  CachePolicy policy = policy_of(CacheRule::kLfu, 4, 1);
  for (int i = 0; i < 30; ++i) {
    policy.begin_step(1, true);
    policy.count(0, std::vector<std::int32_t>{2, 2, 2, 0});  // a batch
    EXPECT_TRUE(policy.choose().empty());
    policy.arrived(true);
  }
  EXPECT_TRUE(holds(policy, 0));
  decode(policy, {2});
  EXPECT_EQ(policy.choose().size(), 1U);
}

TEST(CachePolicy, CopiesNoMoreThanTheBudgetAndTheBestOfAllLayersFirst) {
  CachePolicy policy = policy_of(CacheRule::kLfu, 8, 2, 2 * kExpertBytes, 3);
  for (int i = 0; i < 10; ++i) {
    policy.begin_step(1, true);
    policy.count(0, std::vector<std::int32_t>{4});
    policy.count(1, std::vector<std::int32_t>{5, 5, 5});
    policy.count(2, std::vector<std::int32_t>{6, 6});
  }
  const auto arrivals = policy.choose();
  ASSERT_EQ(arrivals.size(), 2U);
  EXPECT_EQ(arrivals[0].layer, 1U);
  EXPECT_EQ(arrivals[1].layer, 2U);
}

TEST(CachePolicy, AnExpertOfMoreThanAStepsBudgetComesAfterSeveralSteps) {
  CachePolicy policy = policy_of(CacheRule::kLru, 8, 1, kExpertBytes / 4);
  std::size_t swaps = 0;
  for (int i = 0; i < 120; ++i) swaps += decode(policy, {1 + i / 20}).size();
  EXPECT_GE(swaps, 2U);
  EXPECT_LE(swaps, 30U);
}

TEST(CachePolicy, AFailedCopyLeavesAnEmptySlotThatIsFilledNext) {
  CachePolicy policy = policy_of(CacheRule::kLru, 4, 1);
  for (int i = 0; i < 20; ++i) {
    policy.begin_step(1, true);
    policy.count(0, std::vector<std::int32_t>{3});
  }
  ASSERT_EQ(policy.choose().size(), 1U);
  EXPECT_FALSE(holds(policy, 0));
  policy.arrived(false);
  EXPECT_FALSE(holds(policy, 3));
  ASSERT_EQ(policy.choose().size(), 1U);
  policy.arrived(true);
  EXPECT_TRUE(holds(policy, 3));
}

// Whatever is chosen: at any time each slot has one expert at most, tables name no slot whose copy is not
// over, and no victim was used in the step before.
TEST(CachePolicy, TablesStayPartialInjections) {
  std::mt19937 random(7);
  for (int round = 0; round < 40; ++round) {
    const auto number = [&](int low, int high) {
      return std::uniform_int_distribution<int>(low, high)(random);
    };
    const std::int32_t experts = number(2, 40), slots = number(1, experts), top_k = number(1, 4);
    const auto layers = static_cast<std::size_t>(number(1, 4));
    CachePolicy policy =
        policy_of(round % 2 ? CacheRule::kLru : CacheRule::kLfu, experts, slots,
                  static_cast<std::uint64_t>(number(0, 12)) * kExpertBytes / 2, layers, top_k);
    std::set<std::pair<std::size_t, std::int32_t>> used;
    for (int step = 0; step < 100; ++step) {
      const bool is_decode = number(0, 5) > 0;
      std::vector<std::vector<std::int32_t>> before;
      for (std::size_t l = 0; l < layers; ++l)
        before.emplace_back(policy.slots(l).begin(), policy.slots(l).end());
      const auto arrivals = is_decode ? policy.choose() : std::vector<CacheArrival>{};
      std::set<std::pair<std::size_t, std::int32_t>> taken;
      for (const CacheArrival& a : arrivals) {
        EXPECT_EQ(before[a.layer][static_cast<std::size_t>(a.expert)], CachePolicy::kNone);
        EXPECT_TRUE(taken.insert({a.layer, a.slot}).second);
        for (std::int32_t e = 0; e < experts; ++e) {
          EXPECT_NE(policy.slots(a.layer)[static_cast<std::size_t>(e)], a.slot);
          if (before[a.layer][static_cast<std::size_t>(e)] == a.slot) {
            EXPECT_FALSE(used.contains({a.layer, e}));
          }
        }
      }
      const int tokens = is_decode ? number(1, 3) : number(1, 30);
      policy.begin_step(tokens, is_decode);
      used.clear();
      for (std::size_t l = 0; l < layers; ++l) {
        std::vector<std::int32_t> ids(static_cast<std::size_t>(tokens * top_k));
        for (std::size_t i = 0; i < ids.size(); ++i) {
          ids[i] = number(0, number(0, experts - 1));
          if (is_decode || i + static_cast<std::size_t>(top_k) >= ids.size()) used.insert({l, ids[i]});
        }
        policy.count(l, ids);
      }
      if (is_decode) policy.arrived(number(0, 9) > 0);
      for (std::size_t l = 0; l < layers; ++l) {
        std::set<std::int32_t> seen;
        for (const std::int32_t slot : policy.slots(l)) {
          EXPECT_LT(slot, slots);
          if (slot != CachePolicy::kNone) {
            EXPECT_TRUE(seen.insert(slot).second);
          }
        }
      }
    }
  }
}

}  // namespace
}  // namespace hetcomp::gpu
