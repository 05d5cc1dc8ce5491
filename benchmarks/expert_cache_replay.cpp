// Replays recorded routing through the runtime's expert cache policy, a token a step.
//
// expert_cache_replay RULE LAYERS EXPERTS TOP_K SLOTS PER_STEP < ids > hits
// ids: int32 [tokens][LAYERS][TOP_K]; hits: int32 [tokens], choices of the token that found their expert.
// PER_STEP: experts that may be copied under a step.
#include <cstdio>
#include <cstdlib>
#include <string>
#include <vector>

#include "gpu/cache_policy.h"

int main(int count, char** arguments) {
  using namespace hetcomp::gpu;
  if (count != 7) return 2;
  const auto number = [&](int i) { return std::atoi(arguments[i]); };
  const CacheRule rule = std::string(arguments[1]) == "lru" ? CacheRule::kLru : CacheRule::kLfu;
  const auto layers = static_cast<std::size_t>(number(2)), top_k = static_cast<std::size_t>(number(4));
  const std::int32_t experts = number(3), slots = number(5);
  CachePolicy policy(rule, std::vector<CachedLayer>(layers, {experts, number(4), 1}), slots,
                     static_cast<std::uint64_t>(number(6)));
  for (std::size_t layer = 0; layer < layers; ++layer)
    for (std::int32_t e = 0; e < slots; ++e) policy.place(layer, e, e);
  std::vector<std::int32_t> ids(layers * top_k);
  while (std::fread(ids.data(), sizeof(std::int32_t), ids.size(), stdin) == ids.size()) {
    policy.choose();
    policy.begin_step(1, true);
    std::int32_t hits = 0;
    for (std::size_t layer = 0; layer < layers; ++layer) {
      const std::span<const std::int32_t> mine(ids.data() + layer * top_k, top_k);
      policy.count(layer, mine);
      for (const std::int32_t e : mine)
        hits += policy.slots(layer)[static_cast<std::size_t>(e)] != CachePolicy::kNone ? 1 : 0;
    }
    policy.arrived(true);
    std::fwrite(&hits, sizeof hits, 1, stdout);
  }
  return 0;
}
