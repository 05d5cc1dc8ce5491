// Behind which nodes of a graph events are recorded.
#include <gtest/gtest.h>

#include <algorithm>

#include "gpu/event_places.h"

namespace hetcomp::gpu {
namespace {

// Nodes of which every n-th is a hand-over, the first behind n - 1 others.
std::vector<bool> every(std::size_t n, std::size_t nodes) {
  std::vector<bool> hand_overs(nodes);
  for (std::size_t i = n - 1; i < nodes; i += n) hand_overs[i] = true;
  return hand_overs;
}

bool has(const std::vector<std::size_t>& places, std::size_t node) {
  return std::ranges::binary_search(places, node);
}

TEST(EventPlaces, AreBehindEveryNodeWhereThereIsRoom) {
  EXPECT_TRUE(event_places({}).empty());
  for (const std::size_t nodes : {std::size_t{1}, std::size_t{50}, kMostEvents - 1}) {
    const std::vector<std::size_t> places = event_places(every(2, nodes));
    ASSERT_EQ(places.size(), nodes);
    for (std::size_t i = 0; i < nodes; ++i) EXPECT_EQ(places[i], i);
  }
}

TEST(EventPlaces, AreBeforeAndBehindHandOversAndEvenlyAmongTheRest) {
  const std::vector<bool> hand_overs = every(12, 576);
  const std::vector<std::size_t> places = event_places(hand_overs);
  ASSERT_EQ(places.size(), kMostEvents - 1);
  EXPECT_TRUE(std::ranges::is_sorted(places));
  EXPECT_EQ(std::ranges::adjacent_find(places), places.end());
  for (std::size_t i = 0; i < hand_overs.size(); ++i)
    EXPECT_TRUE(!hand_overs[i] || (has(places, i) && has(places, i - 1))) << i;
  // 96 of 109 are spent; the thirteen others are among the 480 nodes of 48 layers.
  std::vector<std::size_t> layers;
  for (const std::size_t place : places)
    if (!hand_overs[place] && !hand_overs[place + 1]) layers.push_back(place / 12);
  ASSERT_EQ(layers.size(), 13U);
  for (std::size_t i = 1; i < layers.size(); ++i) {
    EXPECT_GE(layers[i] - layers[i - 1], 3U);
    EXPECT_LE(layers[i] - layers[i - 1], 4U);
  }
}

TEST(EventPlaces, OfTooManyHandOversAreEvenlyAmongAllNodes) {
  for (const std::size_t nodes : {std::size_t{110}, std::size_t{360}, std::size_t{20'000}}) {
    const std::vector<std::size_t> places = event_places(every(2, nodes));
    ASSERT_EQ(places.size(), kMostEvents - 1);
    EXPECT_EQ(places.back(), nodes - 1);
    for (std::size_t i = 1; i < places.size(); ++i) {
      EXPECT_GT(places[i], places[i - 1]);
      EXPECT_LE(places[i] - places[i - 1], nodes / (kMostEvents - 2) + 1);
    }
  }
}

}  // namespace
}  // namespace hetcomp::gpu
