#include <gtest/gtest.h>

#include "routing_record.h"
#include "status.h"

namespace hetcomp {
namespace {

constexpr std::int32_t kExperts = 10;
const std::vector<std::int32_t> kPositions{3, 4};

struct Layer {
  std::vector<std::int32_t> ids;
  std::vector<float> weights;

  void show(const hetcomp_routing_hook& hook, std::int32_t top_k, std::uint32_t flag = HETCOMP_NO_FLAG) {
    hook.routed(hook.host, flag, kExperts, top_k, ids.data(), weights.data());
  }
};

TEST(RoutingRecord, LayersComeInOrderWhoeverComputesThem) {
  RoutingRecord record;
  for (int repeat = 0; repeat < 2; ++repeat) {
    const hetcomp_routing_hook& hook = *record.begin(kPositions);
    Layer first{{0, 1, 2, 3}, {0.5F, 0.5F, 0.75F, 0.25F}}, second = first;
    first.show(hook, 2);
    second.ids = {9, 9, 9, 9};  // what the step before has left there
    second.show(hook, 2, 5);
    hook.came(hook.host, 4);  // a transfer
    second.ids = {4, 5, 6, 7};
    hook.came(hook.host, 5);
    second.ids = {-1, -1, -1, -1};  // left to the GPU
    const Routing& found = record.finish();
    EXPECT_EQ(found.layers, 2);
    EXPECT_EQ(found.top_k, 2);
    EXPECT_EQ(found.sizes, (std::vector<std::int32_t>{kExperts, kExperts}));
    EXPECT_EQ(found.experts, (std::vector<std::int32_t>{0, 1, 2, 3, 4, 5, 6, 7}));
    EXPECT_EQ(found.weights, (std::vector<float>{0.5F, 0.5F, 0.75F, 0.25F, 0.5F, 0.5F, 0.75F, 0.25F}));
  }
}

TEST(RoutingRecord, LayersOfDifferentShapeAreRefused) {
  RoutingRecord record;
  const hetcomp_routing_hook& hook = *record.begin(std::span(kPositions).first(1));
  Layer{{0, 1}, {1, 1}}.show(hook, 2);
  Layer{{0}, {1}}.show(hook, 1);
  EXPECT_THROW(record.finish(), Error);
  record.begin(kPositions);
  EXPECT_EQ(record.finish().layers, 0);
}

// One layer, three tokens.
Routing recorded() { return {{1, 2, 3, 4, 5, 6}, {0.1F, 0.2F, 0.3F, 0.4F, 0.5F, 0.6F}, 1, 2, {}}; }

TEST(RoutingReplay, ATokenGetsTheRowOfItsPosition) {
  RoutingRecord record;
  record.replay(recorded(), 3);
  Layer layer{{0, 0, 0, 0}, {0, 0, 0, 0}};
  layer.show(*record.begin(kPositions), 2);  // 3 and 4: the first and the second
  EXPECT_EQ(layer.ids, (std::vector<std::int32_t>{1, 2, 3, 4}));
  EXPECT_EQ(layer.weights, (std::vector<float>{0.1F, 0.2F, 0.3F, 0.4F}));
  EXPECT_EQ(record.finish().experts, layer.ids);
  record.replay({}, 0);
  EXPECT_FALSE(record.replays());
}

TEST(RoutingReplay, OfAnotherShapeIsRefusedAndNothingIsWritten) {
  RoutingRecord record;
  record.replay(recorded(), 3);
  const auto refuses = [&](std::int32_t top_k, std::uint32_t flag, int layers) {
    const hetcomp_routing_hook& hook = *record.begin(kPositions);
    for (int i = 0; i < layers; ++i) {
      Layer layer{{7, 7, 7, 7}, {0, 0, 0, 0}};
      layer.show(hook, top_k, flag);
      if (flag != HETCOMP_NO_FLAG) hook.came(hook.host, flag);
      if (i == layers - 1 && layers != 0) {
        EXPECT_EQ(layer.ids, (std::vector<std::int32_t>{7, 7, 7, 7}));
      }
    }
    EXPECT_THROW(record.finish(), Error);
  };
  refuses(1, HETCOMP_NO_FLAG, 1);
  refuses(2, HETCOMP_NO_FLAG, 2);
  refuses(2, HETCOMP_NO_FLAG, 0);
  refuses(2, 3, 1);
  Routing beyond = recorded();
  beyond.experts[3] = kExperts;
  record.replay(beyond, 3);
  refuses(2, HETCOMP_NO_FLAG, 1);
  EXPECT_THROW(record.replay(recorded(), 2), Error);
  EXPECT_THROW(record.replay({}, 1), Error);
}

}  // namespace
}  // namespace hetcomp
