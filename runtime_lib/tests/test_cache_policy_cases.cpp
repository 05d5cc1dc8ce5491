#include <gtest/gtest.h>

#include <algorithm>
#include <fstream>
#include <nlohmann/json.hpp>

#include "gpu/cache_policy.h"

namespace hetcomp::gpu {
namespace {

using Json = nlohmann::json;

CachePolicy policy_of(const Json& entry) {
  std::vector<CachedLayer> layers;
  for (const Json& layer : entry["layers"]) layers.push_back({layer[0], entry["top_k"], layer[1]});
  const std::int32_t slots = entry["slots"], first = entry["first"];
  CachePolicy policy(entry["rule"] == "lru" ? CacheRule::kLru : CacheRule::kLfu, layers, slots,
                     entry["bytes_per_step"]);
  for (std::size_t layer = 0; layer < layers.size(); ++layer)
    for (std::int32_t e = 0; e < std::min({first, slots, layers[layer].experts}); ++e)
      policy.place(layer, e, e);
  return policy;
}

// Whether what the next step copies is looked for when a step ends.
class CachePolicyCases : public testing::TestWithParam<bool> {};

// The planner replays traces through passes/cache_policy.py; tests/unit/test_cache_policy.py made the cases.
TEST_P(CachePolicyCases, ThePlannersPolicyIsThisOne) {
  const Json cases = Json::parse(std::ifstream(CACHE_POLICIES));
  ASSERT_GT(cases.size(), 20U);
  for (std::size_t c = 0; c < cases.size(); ++c) {
    CachePolicy policy = policy_of(cases[c]);
    for (std::size_t s = 0; s < cases[c]["steps"].size(); ++s) {
      const Json& step = cases[c]["steps"][s];
      const bool decode = step["decode"];
      Json arrivals = Json::array(), hits = Json::array();
      if (decode)
        for (const CacheArrival& a : policy.choose()) arrivals.push_back({a.layer, a.expert, a.slot});
      policy.begin_step(step["tokens"], decode);
      for (std::size_t layer = 0; layer < policy.layers(); ++layer) {
        const std::vector<std::int32_t> ids = step["ids"][layer];
        policy.count(layer, ids);
        hits.push_back(std::ranges::count_if(ids, [&](std::int32_t e) {
          return policy.slots(layer)[static_cast<std::size_t>(e)] != CachePolicy::kNone;
        }));
      }
      policy.arrived(true);
      if (GetParam()) policy.look_ahead();
      EXPECT_EQ((Json{{"arrivals", arrivals}, {"hits", hits}}), cases[c]["found"][s])
          << "case " << c << ", step " << s;
    }
  }
}

INSTANTIATE_TEST_SUITE_P(Ahead, CachePolicyCases, testing::Bool());

}  // namespace
}  // namespace hetcomp::gpu
