// Weights of the CPU that are copied to the GPU during a step, on the fake driver: what the GPU reads,
// faults, and files that are refused. Meant to be run under ThreadSanitizer too.
#include <gtest/gtest.h>

#include <algorithm>
#include <functional>
#include <stdexcept>
#include <vector>

#include "fake_gpu.h"
#include "status.h"

namespace hetcomp::gpu {
namespace {

using fake::FakeGpuArtifact;
using Json = nlohmann::json;

constexpr int kPortions = 7, kPlaces = 2;  // of the ring
constexpr std::size_t kWidth = FakeGpuArtifact::kWidth;
constexpr std::size_t kBytes = kWidth * sizeof(float);

// A graph of batch size 1 adds up all the weights, one portion after the other; that of batch size 2 is the
// artifact's own.
class WeightStreams : public testing::Test {
 protected:
  WeightStreams() {
    for (int i = 0; i < kPortions; ++i) {
      std::vector<float>& weight = weights_.emplace_back(kWidth);
      for (std::size_t k = 0; k < kWidth; ++k)
        weight[k] = static_cast<float>(1000 * (i + 1)) + static_cast<float>(k);
    }
    Json program = artifact_.read("program.json");
    program["buffers"].push_back({{"name", "ring"}, {"bytes", kPlaces * kBytes}, {"kind", "stream"}});
    program["weight_stream"] = {{"buffer", "ring"}, {"first_flag", 1}, {"flags", kPortions}};
    Json nodes = Json::array(), portions = Json::array();
    const auto add = [&](Json node) {
      node["after"] = nodes.empty() ? Json::array() : Json::array({nodes.size() - 1});
      nodes.push_back(std::move(node));
    };
    for (int i = 0; i < kPortions; ++i) {
      const std::size_t place = static_cast<std::size_t>(i % kPlaces) * kBytes;
      Json portion{{"flag", 1 + i}, {"copies", {{{"weight", i}, {"bytes", kBytes}, {"to", place}}}}};
      if (i >= kPlaces) portion["after"] = 1 + i - kPlaces;
      portions.push_back(portion);
      add({{"hand_over", {{"flag", 1 + i}, {"from", "cpu"}, {"to", "gpu:0"}}}});
      add({{"kernel", "add"},
           {"grid", {1, 1, 1}},
           {"arguments",
            {{{"buffer", "ring"}, {"offset", place}},
             fake::buffer("y"),
             fake::buffer("y"),
             {{"i32", kWidth}}}}});
      add({{"hand_over", {{"flag", 1 + i}, {"from", "gpu:0"}, {"to", "cpu"}}}});
    }
    program["graphs"][0] = {{"batch", 1}, {"exact", false}, {"nodes", nodes}, {"portions", portions}};
    artifact_.write("program.json", program);
  }
  ~WeightStreams() override {
    fake_.refuse_pinning = false;
    fake_.most_pinned = SIZE_MAX;
    EXPECT_EQ(fake_.live(), 0);
  }

  HostWeights host_weights() const {
    HostWeights all;
    for (const std::vector<float>& weight : weights_)
      all.weights.emplace_back(reinterpret_cast<const std::uint8_t*>(weight.data()), kBytes);
    all.regions = all.weights;
    return all;
  }
  std::unique_ptr<ProgramSet> load() const {
    auto programs =
        std::make_unique<ProgramSet>(driver_, artifact_.path(), FakeGpuArtifact::programs(), GpuOptions{});
    programs->attach(host_weights());
    return programs;
  }
  static void run(ProgramSet& programs, const std::function<void(HandShake&)>& cpu = [](HandShake&) {}) {
    std::ranges::fill(programs.host("y"), std::byte{0});
    programs.run(1, cpu, 20);
  }
  void expect_sums(const ProgramSet& programs) const {
    const auto* y = reinterpret_cast<const float*>(programs.host("y").data());
    for (std::size_t k = 0; k < kWidth; ++k) {
      float sum = 0;
      for (const std::vector<float>& weight : weights_) sum += weight[k];
      EXPECT_EQ(y[k], sum) << k;
    }
  }
  void expect_refused(const std::string& word, const std::function<void(Json&)>& change) {
    const Json good = artifact_.read("program.json");
    Json bad = good;
    change(bad);
    artifact_.write("program.json", bad);
    try {
      load();
      ADD_FAILURE() << "no error; expected " << word;
    } catch (const Error& error) {
      EXPECT_EQ(error.status(), HETCOMP_BAD_ARTIFACT);
      EXPECT_NE(std::string(error.what()).find(word), std::string::npos) << error.what();
    }
    artifact_.write("program.json", good);
  }

  FakeCuda& fake_ = fake::healthy_fake_cuda();
  CudaDriver driver_{FAKE_CUDA};
  FakeGpuArtifact artifact_{1};
  std::vector<std::vector<float>> weights_;
};
// With weights that are pinned, and with those that come through pinned memory beside them.
class PinnedWeightsOrNot : public WeightStreams, public testing::WithParamInterface<bool> {
 protected:
  PinnedWeightsOrNot() { fake_.refuse_pinning = !GetParam(); }
};
INSTANTIATE_TEST_SUITE_P(Both, PinnedWeightsOrNot, testing::Bool(),
                         [](const auto& info) { return info.param ? "pinned" : "ring"; });

TEST_P(PinnedWeightsOrNot, ComeBeforeTheyAreReadAndStayUntilThen) {
  const auto programs = load();
  EXPECT_TRUE(programs->streams_weights());
  EXPECT_TRUE(programs->streams_weights(1, false));
  EXPECT_FALSE(programs->streams_weights(2, false));
  for (int n = 0; n < 30; ++n) {
    run(*programs);
    expect_sums(*programs);
  }
  EXPECT_EQ(programs->weight_bytes(), 30 * kPortions * kBytes);
  programs->reset_statistics();
  programs->run(2, [](HandShake&) {});
  EXPECT_EQ(programs->weight_bytes(), 0U);
}

TEST_P(PinnedWeightsOrNot, AStepThatIsGivenUpLeavesTheNextOneItsRing) {
#ifdef __SANITIZE_THREAD__
  GTEST_SKIP() << "a graph that is given up reads weights while copies to them run; nobody reads its results";
#endif
  const auto programs = load();
  EXPECT_THROW(run(*programs, [](HandShake&) { throw std::runtime_error("the CPU's part"); }),
               std::runtime_error);
  try {
    run(*programs, [](HandShake& hand_shake) { hand_shake.abort("somebody's wish"); });
    // The GPU may have been faster.
  } catch (const Error& error) {
    EXPECT_NE(std::string(error.what()).find("somebody's wish"), std::string::npos) << error.what();
  }
  run(*programs);
  expect_sums(*programs);
}

TEST_F(WeightStreams, WithoutAWayToCopyNothingIsLoaded) {
  fake_.refuse_pinning = true;
  fake_.most_pinned = 1 << 20;
  try {
    load();
    ADD_FAILURE() << "no error";
  } catch (const Error& error) {
    EXPECT_EQ(error.status(), HETCOMP_OUT_OF_MEMORY);
    EXPECT_NE(std::string(error.what()).find("Prompts need weights of the CPU"), std::string::npos)
        << error.what();
  }
}

TEST_F(WeightStreams, WhatDoesNotFitIsRefused) {
  const auto portion = [](Json& program, std::size_t i) -> Json& {
    return program["graphs"][0]["portions"][i];
  };
  expect_refused("inside the ring", [&](Json& p) { portion(p, 1)["copies"][0]["to"] = kBytes + 16; });
  expect_refused("behind that of the portion before", [&](Json& p) { portion(p, 1)["flag"] = 3; });
  expect_refused("the first portion", [&](Json& p) { portion(p, 0)["after"] = 1; });
  expect_refused("after", [&](Json& p) { portion(p, 3)["after"] = 4; });
  expect_refused("at least one copy", [&](Json& p) { portion(p, 3)["copies"] = Json::array(); });
  expect_refused("no weights are streamed", [](Json& p) { p.erase("weight_stream"); });
  expect_refused("a wait for each portion", [](Json& p) { p["graphs"][0].erase("portions"); });
  expect_refused("a wait for each portion", [](Json& p) { p["graphs"][0]["portions"].erase(6); });
  expect_refused("first_flag", [](Json& p) { p["weight_stream"]["first_flag"] = 0; });
  expect_refused("of kind stream", [](Json& p) { p["weight_stream"]["buffer"] = "y"; });
  expect_refused("streams weight 7", [&](Json& p) { portion(p, 2)["copies"][0]["weight"] = kPortions; });
  HostWeights less = host_weights();
  less.weights[3] = less.weights[3].first(kBytes - 1);
  ProgramSet programs(driver_, artifact_.path(), FakeGpuArtifact::programs(), GpuOptions{});
  EXPECT_THROW(programs.attach(less), Error);
}

}  // namespace
}  // namespace hetcomp::gpu
