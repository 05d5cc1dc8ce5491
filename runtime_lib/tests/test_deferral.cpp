// Expert deferral as a program does it on its lanes; meant to be run under ThreadSanitizer too.
#include <gtest/gtest.h>
#include <sched.h>

#include <algorithm>
#include <array>
#include <cstdint>
#include <numeric>
#include <vector>

#include "hetcomp/deferral.h"
#include "hetcomp/lane.h"
#include "lane_threads.h"

namespace hetcomp {
namespace {

using Ids = std::vector<std::int32_t>;

struct Divided {
  Ids now, later;
  friend bool operator==(const Divided&, const Divided&) = default;
};

Divided divide(const Ids& ids, const std::vector<float>& weights, std::int64_t top_k, std::int64_t deferred,
               const bool* on_cpu = nullptr) {
  Divided found{Ids(ids.size(), -7), Ids(ids.size(), -7)};
  divide_choices(static_cast<std::int64_t>(ids.size()) / top_k, top_k, deferred, on_cpu, ids.data(),
                 weights.data(), found.now.data(), found.later.data());
  return found;
}

TEST(DivideChoices, TheSmallestWeightsOfTheCpusChoicesAreLeft) {
  const Ids ids{3, 0, 2, 1};
  const std::vector<float> weights{0.4F, 0.1F, 0.3F, 0.2F};
  EXPECT_EQ(divide(ids, weights, 4, 0), (Divided{{3, 0, 2, 1}, {-1, -1, -1, -1}}));
  EXPECT_EQ(divide(ids, weights, 4, 2), (Divided{{3, -1, 2, -1}, {-1, 0, -1, 1}}));
  EXPECT_EQ(divide(ids, weights, 4, 9), (Divided{{-1, -1, -1, -1}, {3, 0, 2, 1}}));
  constexpr std::array on_cpu{false, true, false, true};
  EXPECT_EQ(divide(ids, weights, 4, 1, on_cpu.data()), (Divided{{3, -1, -1, -1}, {-1, -1, -1, 1}}));
  EXPECT_EQ(divide(ids, weights, 4, 3, on_cpu.data()), (Divided{{-1, -1, -1, -1}, {3, -1, -1, 1}}));
}

TEST(DivideChoices, OfEqualWeightsTheLaterChoiceIsLeftAndRowsAreAlone) {
  EXPECT_EQ(divide({5, 6, 7, 5, 6, 7}, {0.5F, 0.5F, 0.5F, 0.1F, 0.1F, 0.2F}, 3, 1),
            (Divided{{5, 6, -1, 5, -1, 7}, {-1, -1, 7, -1, 6, -1}}));
}

constexpr std::size_t kRows = 9, kTopK = 4, kEntries = kRows * kTopK;
constexpr std::uint32_t kLayers = 24;
constexpr std::int64_t kDeferred = 2;  // of every layer but the last
using Rows = std::array<float, kRows>;

// What a GPU would hand out for a layer, the sums exact in float.
std::int32_t id_of(std::uint32_t layer, std::size_t entry) {
  return static_cast<std::int32_t>((layer * 7 + entry * 5) % 16);
}
float weight_of(std::uint32_t layer, std::size_t entry) {
  return static_cast<float>((layer * 3 + entry * 11) % 8) / 8;
}
float output_of(std::int32_t id, float weight) { return weight * static_cast<float>(id + 1); }

struct Step {
  // Two sets, taken in turns: the next layer's is written while lanes still read what they have deferred.
  std::array<std::array<std::int32_t, kEntries>, 2> ids{};
  std::array<std::array<float, kEntries>, 2> weights{};
  std::array<std::array<std::int32_t, kEntries>, 2> later{};
  std::array<std::int32_t, kEntries> now{};
  Rows sum{}, deferred{};
  std::vector<Rows> answers;
  hetcomp_hand_over hand_over{this, wait, answer, nullptr, 0, UINT32_MAX};

  static int wait(void* host, std::uint32_t layer) {
    auto& d = *static_cast<Step*>(host);
    for (std::size_t i = 0; i < kEntries; ++i) {
      d.ids[layer % 2][i] = id_of(layer, i);
      d.weights[layer % 2][i] = weight_of(layer, i);
    }
    return 1;
  }
  static void answer(void* host, std::uint32_t) {
    auto& d = *static_cast<Step*>(host);
    d.answers.push_back(d.sum);
  }
};

void experts(Lane& lane, const std::int32_t* ids, const float* weights, Rows& sums) {
  parallel_for(lane, kRows, 1, [&](std::int64_t begin, std::int64_t end) {
    for (auto row = static_cast<std::size_t>(begin); row < static_cast<std::size_t>(end); ++row) {
      sums[row] = 0;
      for (std::size_t i = row * kTopK; i < (row + 1) * kTopK; ++i)
        if (ids[i] >= 0) sums[row] += output_of(ids[i], weights[i]);
    }
  });
}

void layers(hetcomp_lane* lane, const hetcomp_step* step) {
  auto& d = *reinterpret_cast<Step*>(step->arena);
  for (std::uint32_t layer = 0; layer < kLayers; ++layer) {
    const std::int32_t* const ids = d.ids[layer % 2].data();
    const float* const weights = d.weights[layer % 2].data();
    std::int32_t* const left = d.later[layer % 2].data();
    const bool defers = layer + 1 < kLayers;
    const auto divide = [&] {
      if (defers) divide_choices(kRows, kTopK, kDeferred, nullptr, ids, weights, d.now.data(), left);
    };
    if (!await_gpu(*lane, *step, layer, divide)) return;
    experts(*lane, defers ? d.now.data() : ids, weights, d.sum);
    if (layer > 0) {
      barrier(*lane);
      parallel_for(*lane, kRows, 2, [&](std::int64_t begin, std::int64_t end) {
        for (auto row = static_cast<std::size_t>(begin); row < static_cast<std::size_t>(end); ++row)
          d.sum[row] += d.deferred[row];
      });
    }
    answer_gpu(*lane, *step, layer);
    if (defers) experts(*lane, left, weights, d.deferred);
  }
  barrier(*lane);
}

std::vector<Rows> expected() {
  std::vector<Rows> answers;
  Rows left{};
  for (std::uint32_t layer = 0; layer < kLayers; ++layer) {
    Rows sum = left;
    left = {};
    for (std::size_t row = 0; row < kRows; ++row) {
      std::array<std::size_t, kTopK> order;
      std::iota(order.begin(), order.end(), row * kTopK);
      std::ranges::sort(order, [&](std::size_t a, std::size_t b) {
        const float x = weight_of(layer, a), y = weight_of(layer, b);
        return x < y || (x == y && a > b);
      });
      for (std::size_t i = 0; i < kTopK; ++i)
        (i < kDeferred && layer + 1 < kLayers ? left : sum)[row] +=
            output_of(id_of(layer, order[i]), weight_of(layer, order[i]));
    }
    answers.push_back(sum);
  }
  return answers;
}

class DeferringLanes : public testing::TestWithParam<int> {};
INSTANTIATE_TEST_SUITE_P(Threads, DeferringLanes, testing::Values(1, 2, 3, 4));

TEST_P(DeferringLanes, EveryLayerAnswersWithWhatTheOneBeforeLeft) {
  LaneThreads lanes(std::vector<LaneGroup>{{GetParam(), {sched_getcpu()}}});
  hetcomp_program program{};
  program.run = layers;
  for (int round = 0; round < 20; ++round) {
    Step d;
    hetcomp_step step{};
    step.arena = reinterpret_cast<std::uint8_t*>(&d);
    step.hand_over = &d.hand_over;
    EXPECT_EQ(lanes.run(program, step), 0);
    EXPECT_EQ(d.answers, expected());
  }
}

}  // namespace
}  // namespace hetcomp
