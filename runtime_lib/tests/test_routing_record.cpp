#include <gtest/gtest.h>

#include "routing_record.h"
#include "status.h"

namespace hetcomp {
namespace {

struct Layer {
  std::vector<std::int32_t> ids;
  std::vector<float> weights;

  void show(const hetcomp_routing_hook& hook, std::int32_t top_k, std::uint32_t flag = HETCOMP_NO_FLAG) {
    hook.routed(hook.host, flag, top_k, ids.data(), weights.data());
  }
};

TEST(RoutingRecord, LayersComeInOrderWhoeverComputesThem) {
  RoutingRecord record;
  for (int repeat = 0; repeat < 2; ++repeat) {
    const hetcomp_routing_hook& hook = *record.begin(2);
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
    EXPECT_EQ(found.experts, (std::vector<std::int32_t>{0, 1, 2, 3, 4, 5, 6, 7}));
    EXPECT_EQ(found.weights, (std::vector<float>{0.5F, 0.5F, 0.75F, 0.25F, 0.5F, 0.5F, 0.75F, 0.25F}));
  }
}

TEST(RoutingRecord, LayersOfDifferentShapeAreRefused) {
  RoutingRecord record;
  const hetcomp_routing_hook& hook = *record.begin(1);
  Layer{{0, 1}, {1, 1}}.show(hook, 2);
  Layer{{0}, {1}}.show(hook, 1);
  EXPECT_THROW(record.finish(), Error);
  record.begin(1);
  EXPECT_EQ(record.finish().layers, 0);
}

}  // namespace
}  // namespace hetcomp
