// Experts that are copied to the GPU during a step, on the fake driver: the split, what the CPU and the GPU
// are told, faults, and files that are refused. Meant to be run under ThreadSanitizer too.
#include <gtest/gtest.h>

#include <chrono>
#include <fstream>
#include <functional>
#include <map>
#include <stdexcept>

#include "fake_gpu.h"
#include "gpu/stream_split.h"
#include "status.h"

namespace hetcomp::gpu {
namespace {

using fake::FakeGpuArtifact;
using Json = nlohmann::json;

TimeCurve curve_of(const Json& json) {
  std::vector<std::pair<std::int64_t, double>> points;
  for (const Json& point : json) points.emplace_back(point[0], point[1]);
  return TimeCurve(std::move(points));
}

TEST(StreamSplit, IsThePlannersOwn) {
  const Json cases = Json::parse(std::ifstream(STREAM_SPLITS));
  ASSERT_GT(cases.size(), 100U);
  for (const Json& entry : cases) {
    const Json& rates = entry["rates"];
    const Json& input = entry["input"];
    const std::vector<std::int32_t> tokens = input["tokens"];
    const std::size_t found =
        split_experts({.tokens = tokens,
                       .copied = input["copied"],
                       .slots = input["slots"],
                       .step_tokens = input["step_tokens"],
                       .resident_us = input["resident_us"],
                       .expert_bytes = input["expert_bytes"],
                       .activation_bytes = input["activation_bytes"]},
                      {rates["link_gb_per_s"].get<double>() * 1e3, curve_of(rates["cpu_expert_us"]),
                       curve_of(rates["gpu_expert_us"]), curve_of(rates["spine_us"])});
    EXPECT_EQ(found, entry["copied"].get<std::size_t>()) << entry.dump();
  }
}

// The fake artifact with a stream: four experts of a row each in every layer, of which a token chooses two.
// What comes into the last layer's slot 0 is added to y in place of the weight.
class ExpertStreams : public testing::Test {
 protected:
  static constexpr int kLayers = 3, kExperts = 4, kTopK = 2, kTokens = 20;
  static constexpr std::uint64_t kExpertBytes = FakeGpuArtifact::kWidth * sizeof(float);
  static constexpr std::uint64_t kHalf = kExperts * kExpertBytes;

  ExpertStreams() {
    for (std::size_t i = 0; i < weights_.size(); ++i)
      weights_[i] = static_cast<float>(100 * (i / FakeGpuArtifact::kWidth + 1));
    write(1e6);
  }
  ~ExpertStreams() override {
    fake_.refuse_pinning = false;
    fake_.most_pinned = SIZE_MAX;
    EXPECT_EQ(fake_.live(), 0);
  }

  // cpu_us: what an expert takes on the CPU; a copy takes 0.256 us.
  void write(double cpu_us, int slots = kExperts) {
    Json program = pristine_;
    Json layers = Json::array();
    for (int i = 0; i < kLayers; ++i) {
      const Json source{{"weight", i}, {"experts", {{0, kExperts}}}};
      const Json operand{{"buffer", "slots"},
                         {"offset", i % 2 * kHalf},
                         {"expert_bytes", kExpertBytes},
                         {"sources", {source}}};
      layers.push_back({{"hand_over", i},
                        {"experts", kExperts},
                        {"top_k", kTopK},
                        {"hidden", 1},
                        {"ids", "routing"},
                        {"operands", {operand}}});
    }
    const Json none = Json::array({Json::array({1, 0.0})});
    program["stream"] = {
        {"slots", slots},
        {"first_flag", kLayers},
        {"tables", {{"buffer", "tables"}, {"row_bytes", 48}, {"part_offset", 16}, {"ask_offset", 32}}},
        {"rates",
         {{"link_gb_per_s", 1.0},
          {"cpu_expert_us", Json::array({Json::array({1, cpu_us})})},
          {"gpu_expert_us", none},
          {"spine_us", none}}},
        {"layers", layers}};
    program["buffers"].push_back({{"name", "slots"}, {"bytes", 2 * kHalf}, {"kind", "stream"}});
    program["buffers"].push_back({{"name", "tables"}, {"bytes", 48 * (kLayers + 1)}, {"kind", "stream"}});
    program["buffers"].push_back(
        {{"name", "routing"}, {"bytes", 4 * kTokens * kTopK}, {"kind", "pinned_out"}});
    Json& nodes = program["graphs"][0]["nodes"];
    const int last = static_cast<int>(nodes.size()) - 1;
    Json before = nodes[last]["after"];
    for (int i = 0; i < kLayers; ++i) {
      nodes.push_back(
          {{"hand_over", {{"flag", kLayers + i}, {"from", "cpu"}, {"to", "gpu:0"}}}, {"after", before}});
      before = Json::array({nodes.size() - 1});
    }
    nodes[last]["after"] = before;
    nodes[last]["arguments"][1] = {{"buffer", "slots"}, {"offset", (kLayers - 1) % 2 * kHalf}};
    artifact_.write("program.json", program);
  }

  HostWeights host_weights() const {
    const std::span all(reinterpret_cast<const std::uint8_t*>(weights_.data()),
                        weights_.size() * sizeof(float));
    return {.weights = {all, all, all}, .regions = {all}};
  }

  // The CPU's part: the routing comes from the GPU, the layer is decided, and `seen` looks at what is left.
  using Seen = std::function<void(int layer, std::span<const std::int32_t> ids, std::uint8_t skip)>;
  void step(ProgramSet& program, const std::vector<std::int32_t>& routing, const Seen& seen) {
    const auto cpu = [&](HandShake& hand_shake) {
      const std::span<std::byte> host = program.host("routing");
      const std::span ids(reinterpret_cast<std::int32_t*>(host.data()),
                          static_cast<std::size_t>(kTokens * kTopK));
      for (int layer = 0; layer < kLayers; ++layer) {
        if (!hand_shake.wait_for_gpu(static_cast<std::uint32_t>(layer))) return;
        for (std::size_t i = 0; i < ids.size(); ++i) ids[i] = routing[i % routing.size()];
        program.route(static_cast<std::uint32_t>(layer));
        seen(layer, ids, program.skip()[layer]);
        FakeGpuArtifact::compute(program, layer);
        hand_shake.answer(static_cast<std::uint32_t>(layer));
      }
    };
    program.run(1, cpu, kTokens);
  }
  void attach(ProgramSet& program) const {
    const Attachment attachment = program.attach(host_weights());
    EXPECT_EQ(attachment.not_pinned.empty(), !fake_.refuse_pinning);
    EXPECT_EQ(attachment.not_staged, "");
  }
  // y - x of the last step.
  static float added(const ProgramSet& program) {
    const float y = reinterpret_cast<const float*>(program.host("y").data())[0];
    float x = reinterpret_cast<const float*>(program.host("input").data())[0];
    for (int layer = 0; layer < kLayers; ++layer) x = 3 * (x + 1) + (2 * x - 1);
    return y - x;
  }
  void expect_refused(const std::string& word, const std::function<void(Json&)>& change) {
    Json bad = artifact_.read("program.json");
    const Json good = bad;
    change(bad);
    artifact_.write("program.json", bad);
    try {
      const ProgramSet program(driver_, artifact_.path(), FakeGpuArtifact::programs(), {});
      FAIL() << "no error; expected " << word;
    } catch (const Error& error) {
      EXPECT_EQ(error.status(), HETCOMP_BAD_ARTIFACT);
      EXPECT_NE(std::string(error.what()).find(word), std::string::npos) << error.what();
    }
    artifact_.write("program.json", good);
  }

  FakeCuda& fake_ = fake::healthy_fake_cuda();
  FakeGpuArtifact artifact_{kLayers};
  Json pristine_ = artifact_.read("program.json");
  CudaDriver driver_{FAKE_CUDA};
  std::vector<float> weights_ = std::vector<float>(kExperts * FakeGpuArtifact::kWidth);
};

TEST_F(ExpertStreams, WhatTheCpuIsTooSlowForIsCopied) {
  ProgramSet program(driver_, artifact_.path(), FakeGpuArtifact::programs(), {});
  attach(program);
  for (int n = 0; n < 20; ++n) {
    step(program, {3, 1, 2, 0}, [](int, std::span<const std::int32_t> ids, std::uint8_t skip) {
      EXPECT_EQ(skip, 1);
      EXPECT_EQ(ids[0], 3);  // nobody reads them
    });
    ASSERT_EQ(added(program), 100.0F);  // expert 0 came to slot 0
  }
  EXPECT_EQ(program.stream_statistics().experts_copied, 20 * kLayers * kExperts);
  EXPECT_EQ(program.stream_statistics().bytes, 20 * kLayers * static_cast<std::int64_t>(kHalf));
}

TEST_F(ExpertStreams, TheRestIsLeftToTheCpu) {
  write(1e6, 2);  // two slots: of the four experts the first two are expected, whatever the routing is
  ProgramSet program(driver_, artifact_.path(), FakeGpuArtifact::programs(), {});
  attach(program);
  step(program, {3, 1, 2, 0}, [](int, std::span<const std::int32_t> ids, std::uint8_t skip) {
    EXPECT_EQ(skip, 0);
    const std::vector<std::int32_t> wanted{3, -1, 2, -1};
    EXPECT_TRUE(std::ranges::equal(ids.first(4), wanted));
  });
  EXPECT_EQ(added(program), 100.0F);
}

TEST_F(ExpertStreams, AFastCpuGetsNothingCopied) {
  write(0.0);
  ProgramSet program(driver_, artifact_.path(), FakeGpuArtifact::programs(), {});
  attach(program);
  step(program, {3, 1, 2, 0}, [](int, std::span<const std::int32_t> ids, std::uint8_t skip) {
    EXPECT_EQ(skip, 0);
    EXPECT_EQ(ids[0], 3);
  });
  EXPECT_EQ(program.stream_statistics().experts_copied, 0);
}

TEST_F(ExpertStreams, WhereMemoryCannotBePinnedThereIsARing) {
  fake_.refuse_pinning = true;
  ProgramSet program(driver_, artifact_.path(), FakeGpuArtifact::programs(), {});
  attach(program);
  for (int n = 0; n < 20; ++n) {
    step(program, {3, 1, 2, 0},
         [](int, std::span<const std::int32_t>, std::uint8_t skip) { EXPECT_EQ(skip, 1); });
    ASSERT_EQ(added(program), 100.0F);
  }
  EXPECT_EQ(program.stream_statistics().bytes, 20 * kLayers * static_cast<std::int64_t>(kHalf));
}

TEST_F(ExpertStreams, WithoutMemoryForTheRingTheCpuComputesAll) {
  fake_.refuse_pinning = true;
  fake_.most_pinned = 1 << 20;
  ProgramSet program(driver_, artifact_.path(), FakeGpuArtifact::programs(), {});
  const Attachment attachment = program.attach(host_weights());
  EXPECT_NE(attachment.not_pinned, "");
  EXPECT_NE(attachment.not_staged.find("refuses 16"), std::string::npos) << attachment.not_staged;
  step(program, {3, 1, 2, 0}, [](int, std::span<const std::int32_t> ids, std::uint8_t skip) {
    EXPECT_EQ(skip, 0);
    EXPECT_EQ(ids[0], 3);
  });
  EXPECT_EQ(program.stream_statistics().experts_copied, 0);
}

// Whatever the driver refuses the thread that fills the ring: the step is given up and the next one is right.
TEST_F(ExpertStreams, ARingThatTheDriverRefusesSomethingGivesTheStepUp) {
#ifdef __SANITIZE_THREAD__
  GTEST_SKIP() << "a graph that is given up reads slots while copies to them run; nobody reads its results";
#endif
  fake_.refuse_pinning = true;
  ProgramSet program(driver_, artifact_.path(), FakeGpuArtifact::programs(), {});
  attach(program);
  const auto nothing = [](int, std::span<const std::int32_t>, std::uint8_t) {};
  const int before = fake_.calls;
  step(program, {3, 1, 2, 0}, nothing);
  const int calls = fake_.calls - before;
  int refused = 0;
  for (int call = 1; call <= calls; ++call) {
    fake_.fail_call = fake_.calls + call;
    try {
      step(program, {3, 1, 2, 0}, nothing);
    } catch (const Error& error) {
      ++refused;
      EXPECT_NE(std::string(error.what()).find("failed"), std::string::npos) << error.what();
    }
    fake_.fail_call = 0;
    step(program, {3, 1, 2, 0}, nothing);
    ASSERT_EQ(added(program), 100.0F);
  }
  EXPECT_GT(refused, 0);
}

// With times and without, from memory that is pinned and through the ring: the same step.
TEST_F(ExpertStreams, TimesAreTakenOfKernelsHandOversAndCopies) {
  for (const bool refused : {false, true}) {
    fake_.refuse_pinning = refused;
    ProgramSet program(driver_, artifact_.path(), FakeGpuArtifact::programs(), {});
    attach(program);
    const auto nothing = [](int, std::span<const std::int32_t>, std::uint8_t) {};
    for (const bool timed : {true, false, true}) {
      program.set_timed(timed);
      const std::int64_t before = std::chrono::steady_clock::now().time_since_epoch().count();
      step(program, {3, 1, 2, 0}, nothing);
      const std::int64_t after = std::chrono::steady_clock::now().time_since_epoch().count();
      ASSERT_EQ(added(program), 100.0F);
      std::map<GpuEvent::Kind, int> found;
      std::size_t bytes = 0;
      for (const GpuEvent& event : program[0].read_times()) {
        ++found[event.kind];
        bytes += event.bytes;
        EXPECT_EQ(event.kernel != nullptr, event.kind == GpuEvent::Kind::kKernel);
        EXPECT_LE(event.begin_ns, event.end_ns);
        // The clocks are put beside each other to some microseconds, on a machine that does other work too.
        EXPECT_GT(event.begin_ns, before - 1'000'000);
        EXPECT_LT(event.end_ns, after + 1'000'000);
      }
      if (!timed) {
        EXPECT_TRUE(program[0].read_times().empty());
        continue;
      }
      int kernels = 0;
      for (const NodeRecord& node : program[0].record().graphs[0].nodes)
        kernels += std::holds_alternative<KernelNode>(node.work) ? 1 : 0;
      EXPECT_EQ(found[GpuEvent::Kind::kKernel], kernels);
      EXPECT_GE(found[GpuEvent::Kind::kHandOver], 2 * kLayers);
      EXPECT_EQ(bytes, kLayers * kHalf);
    }
  }
}

TEST_F(ExpertStreams, AStepThatIsGivenUpLeavesTheNextOneRight) {
#ifdef __SANITIZE_THREAD__
  GTEST_SKIP() << "a graph that is given up reads slots while copies to them run; nobody reads its results";
#endif
  ProgramSet program(driver_, artifact_.path(), FakeGpuArtifact::programs(), {});
  attach(program);
  for (int layer = 0; layer < kLayers; ++layer) {
    EXPECT_THROW(step(program, {3, 1},
                      [&](int at, std::span<const std::int32_t>, std::uint8_t) {
                        if (at == layer) throw std::domain_error("lane");
                      }),
                 std::domain_error);
    step(program, {0, 1, 2, 3}, [](int, std::span<const std::int32_t>, std::uint8_t) {});
    ASSERT_EQ(added(program), 100.0F);
  }
}

TEST_F(ExpertStreams, WeightsThatAreTooSmallAreRefused) {
  ProgramSet program(driver_, artifact_.path(), FakeGpuArtifact::programs(), {});
  HostWeights small = host_weights();
  small.weights[1] = small.weights[1].first(2 * kExpertBytes);
  EXPECT_THROW(program.attach(small), Error);
}

TEST_F(ExpertStreams, DamagedFilesAreRefusedByName) {
  const auto stream = [](Json& program) -> Json& { return program["stream"]; };
  expect_refused("slots", [&](Json& p) { stream(p)["slots"] = 0; });
  expect_refused("first_flag", [&](Json& p) { stream(p)["first_flag"] = kLayers - 1; });
  expect_refused("expert_bytes", [&](Json& p) { stream(p)["slots"] = kExperts + 5; });
  expect_refused("offset", [&](Json& p) { stream(p)["layers"][0]["operands"][0]["offset"] = 8; });
  expect_refused("buffer", [&](Json& p) { stream(p)["layers"][0]["operands"][0]["buffer"] = "x"; });
  expect_refused("hand_over", [&](Json& p) { stream(p)["layers"][1]["hand_over"] = 0; });
  expect_refused("hand_over", [&](Json& p) { stream(p)["layers"][2]["hand_over"] = kLayers; });
  expect_refused("experts",
                 [&](Json& p) { stream(p)["layers"][0]["operands"][0]["sources"][0]["experts"][0][1] = 5; });
  expect_refused("ids", [&](Json& p) { stream(p)["layers"][0]["ids"] = "in"; });
  expect_refused("part_offset", [&](Json& p) { stream(p)["tables"]["part_offset"] = 0; });
  expect_refused("row_bytes", [&](Json& p) { stream(p)["tables"]["row_bytes"] = 64; });
  expect_refused("link_gb_per_s", [&](Json& p) { stream(p)["rates"]["link_gb_per_s"] = 0; });
  expect_refused("spine_us", [&](Json& p) { stream(p)["rates"]["spine_us"] = Json::array(); });
  expect_refused("nodes", [&](Json& p) { p["graphs"][0]["nodes"].back()["hand_over"]["flag"] = kLayers; });
  expect_refused("flag", [&](Json& p) { p["graphs"][0]["nodes"].back()["hand_over"]["flag"] = 2 * kLayers; });
  expect_refused("to", [&](Json& p) { p["graphs"][0]["nodes"].back()["hand_over"]["to"] = "cpu"; });
}

}  // namespace
}  // namespace hetcomp::gpu
