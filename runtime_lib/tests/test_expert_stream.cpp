// Experts that are copied to the GPU during a step, on the fake driver: the split, what the CPU and the GPU
// are told, faults, and files that are refused. Meant to be run under ThreadSanitizer too.
#include <gtest/gtest.h>

#include <chrono>
#include <fstream>
#include <functional>
#include <map>
#include <random>
#include <stdexcept>

#include "gpu/event_places.h"
#include "gpu/stream_split.h"
#include "status.h"
#include "streaming_artifact.h"

namespace hetcomp::gpu {
namespace {

using fake::FakeGpuArtifact;
using fake::Streaming;
using fake::StreamingArtifact;
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
    const Split found = split_experts(
        {.tokens = tokens,
         .copied = input["copied"],
         .most = input["most"],
         .slots = input["slots"],
         .step_tokens = input["step_tokens"],
         .lead_us = input["lead_us"],
         .resident_us = input["resident_us"],
         .expert_bytes = input["expert_bytes"],
         .activation_bytes = input["activation_bytes"]},
        {rates["link_gb_per_s"].get<double>() * 1e3, rates["joint_gb_per_s"].get<double>() * 1e3,
         curve_of(rates["cpu_expert_us"]), curve_of(rates["gpu_expert_us"])});
    EXPECT_EQ(found.copied, entry["split"]["copied"].get<std::size_t>()) << entry.dump();
    EXPECT_NEAR(found.link_free_us, entry["split"]["link_free_us"].get<double>(), 1e-6) << entry.dump();
  }
}

class ExpertStreams : public testing::Test {
 protected:
  static constexpr int kLayers = StreamingArtifact::kLayers;
  using Ids = std::vector<std::int32_t>;

  ~ExpertStreams() override {
    fake_.refuse_pinning = false;
    fake_.most_pinned = SIZE_MAX;
    EXPECT_EQ(fake_.live(), 0);
  }

  static StreamingArtifact::Routing always(const Ids& ids) {
    return [ids](int) { return ids; };
  }
  // What was left to the CPU in each layer of a prompt; nothing where it was skipped.
  std::vector<Ids> prompt(ProgramSet& programs, const StreamingArtifact::Routing& routing) const {
    std::vector<Ids> left(kLayers);
    artifact_.prompt(programs, routing, [&](int layer, std::span<const std::int32_t> ids, bool skip) {
      if (!skip) left[static_cast<std::size_t>(layer)].assign(ids.begin(), ids.end());
    });
    return left;
  }
  // Whether every expert of the layer was added to the sums as often as `times` says.
  void expect_sums(const ProgramSet& programs, int layer, const std::function<int(int)>& times) const {
    const std::span<const float> sums = artifact_.sums(programs, layer);
    for (std::size_t e = 0; e < sums.size(); ++e) {
      const auto expert = static_cast<int>(e);
      EXPECT_EQ(sums[e], static_cast<float>(times(expert)) * StreamingArtifact::value(layer, expert))
          << "layer " << layer << ", expert " << e;
    }
  }
  void expect_refused(const std::string& word, const std::function<void(Json&)>& change) {
    const Json good = artifact_.files().read("program.json");
    Json bad = good;
    change(bad);
    artifact_.files().write("program.json", bad);
    try {
      artifact_.load(driver_);
      ADD_FAILURE() << "no error; expected " << word;
    } catch (const Error& error) {
      EXPECT_EQ(error.status(), HETCOMP_BAD_ARTIFACT);
      EXPECT_NE(std::string(error.what()).find(word), std::string::npos) << error.what();
    }
    artifact_.files().write("program.json", good);
  }

  FakeCuda& fake_ = fake::healthy_fake_cuda();
  CudaDriver driver_{FAKE_CUDA};
  StreamingArtifact artifact_{{}};
};

// With weights that are pinned, and with those that come through the ring.
class PinnedOrNot : public ExpertStreams, public testing::WithParamInterface<bool> {
 protected:
  PinnedOrNot() { fake_.refuse_pinning = !GetParam(); }
};
INSTANTIATE_TEST_SUITE_P(Both, PinnedOrNot, testing::Bool(),
                         [](const auto& info) { return info.param ? "pinned" : "ring"; });

TEST_P(PinnedOrNot, WhatTheCpuIsTooSlowForIsCopied) {
  const auto programs = artifact_.load(driver_);
  for (int n = 0; n < 20; ++n) {
    for (const Ids& left : prompt(*programs, always({3, 1, 2, 0}))) EXPECT_TRUE(left.empty());
    for (int layer = 0; layer < kLayers; ++layer) expect_sums(*programs, layer, [](int) { return 1; });
  }
  const StreamStatistics found = programs->stream_statistics();
  EXPECT_EQ(found.experts_copied, 20 * kLayers * 4);
  EXPECT_EQ(found.experts_wanted, 20 * kLayers * 4);
  EXPECT_EQ(found.bytes, 20 * kLayers * 4 * 64);
}

TEST_P(PinnedOrNot, ASlotIsUsedAgainWithinALayer) {
  for (const auto& [slots, wave] : {std::pair{4, 2}, {1, 1}, {5, 2}, {3, 3}, {24, 12}}) {
    artifact_.write({.experts = 13, .slots = slots, .wave = wave, .waves = (13 + wave - 1) / wave});
    const auto programs = artifact_.load(driver_);
    for (int n = 0; n < 10; ++n) {
      for (const Ids& left : prompt(*programs, always({0, 1, 2, 3, 4, 5, 6, 7, 8, 9, 10, 11, 12})))
        EXPECT_TRUE(left.empty());
      for (int layer = 0; layer < kLayers; ++layer) expect_sums(*programs, layer, [](int) { return 1; });
    }
    EXPECT_EQ(programs->stream_statistics().experts_copied, 10 * kLayers * 13);
  }
}

TEST_F(ExpertStreams, TheRestIsLeftToTheCpu) {
  // At most two experts, those that are expected whatever the routing is.
  artifact_.write({.slots = 2, .wave = 1, .waves = 2});
  const auto programs = artifact_.load(driver_);
  for (const Ids& left : prompt(*programs, always({3, 1, 2, 0}))) {
    ASSERT_FALSE(left.empty());
    EXPECT_TRUE(std::ranges::equal(std::span(left).first(4), Ids{3, -1, 2, -1}));
  }
  for (int layer = 0; layer < kLayers; ++layer)
    expect_sums(*programs, layer, [](int expert) { return expert < 2 ? 1 : 0; });
}

TEST_F(ExpertStreams, AFastCpuGetsNothingCopied) {
  artifact_.write({.cpu_us = 0.0});
  const auto programs = artifact_.load(driver_);
  for (const Ids& left : prompt(*programs, always({3, 1, 2, 0}))) EXPECT_EQ(left.at(0), 3);
  EXPECT_EQ(programs->stream_statistics().experts_copied, 0);
}

TEST_F(ExpertStreams, WithoutMemoryForTheRingTheCpuComputesAll) {
  fake_.refuse_pinning = true;
  fake_.most_pinned = 1 << 20;
  artifact_.write({.slots = 2, .wave = 1, .waves = 4});
  const auto programs = artifact_.load(driver_, false);
  const Attachment attachment = programs->attach(artifact_.host_weights());
  EXPECT_NE(attachment.not_pinned, "");
  EXPECT_NE(attachment.not_staged.find("refuses 16"), std::string::npos) << attachment.not_staged;
  for (const Ids& left : prompt(*programs, always({3, 1, 2, 0}))) EXPECT_EQ(left.at(0), 3);
  EXPECT_EQ(programs->stream_statistics().experts_copied, 0);
}

// Random routings, sizes and speeds, with a cache and without: what a token chose is computed exactly once,
// by the GPU from the cache or a wave, or by the CPU.
TEST_P(PinnedOrNot, EveryChoiceIsComputedOnceWhateverTheRouting) {
  std::mt19937 random(7);
  const auto draw = [&](int low, int high) { return std::uniform_int_distribution(low, high)(random); };
  std::int64_t kept = 0, copied = 0;
  for (int n = 0; n < 25; ++n) {
    const int experts = draw(2, 24), wave = draw(1, 6), cached = draw(0, 1) * draw(1, experts);
    artifact_.write({.experts = experts,
                     .slots = wave * draw(1, 3),
                     .wave = wave,
                     .waves = draw(1, 1 + experts / wave),
                     .cpu_us = draw(0, 2) * 0.2,
                     .cached = cached});
    const auto programs = artifact_.load(driver_);
    for (int s = 0; s < 6; ++s) {
      std::vector<Ids> chosen(kLayers), left(kLayers);
      const bool decodes = cached > 0 && s % 3 == 2;
      const auto routing = [&](int layer) {
        Ids& ids = chosen[static_cast<std::size_t>(layer)];
        const int favourites = draw(1, experts);
        for (int i = 0; i < StreamingArtifact::kTokens * StreamingArtifact::kTopK; ++i)
          ids.push_back(draw(0, favourites - 1) * (experts - 1) / std::max(1, favourites - 1));
        return ids;
      };
      const auto seen = [&](int layer, std::span<const std::int32_t> ids, bool skip) {
        if (!skip) left[static_cast<std::size_t>(layer)].assign(ids.begin(), ids.end());
        chosen[static_cast<std::size_t>(layer)].resize(ids.size());
      };
      decodes ? artifact_.decode(*programs, routing, seen) : artifact_.prompt(*programs, routing, seen);
      for (int layer = 0; layer < kLayers; ++layer) {
        const Ids& wanted = chosen[static_cast<std::size_t>(layer)];
        const Ids& cpu = left[static_cast<std::size_t>(layer)];
        const std::span<const float> sums = artifact_.sums(*programs, layer);
        for (std::size_t i = 0; i < wanted.size(); ++i) {
          const bool on_cpu = !cpu.empty() && cpu[i] >= 0;
          EXPECT_TRUE(!on_cpu || cpu[i] == wanted[i]);
          const float once = StreamingArtifact::value(layer, wanted[i]);
          ASSERT_EQ(sums[static_cast<std::size_t>(wanted[i])], on_cpu ? 0.0F : once) << n << ", step " << s;
        }
      }
    }
    copied += programs->stream_statistics().experts_copied;
    if (programs->caches()) kept += programs->cache_statistics().kept;
  }
  EXPECT_GT(kept, 10);
  EXPECT_GT(copied, 500);
}

TEST_P(PinnedOrNot, WhatPassesThroughStaysInTheCacheForDecoding) {
  artifact_.write({.experts = 12, .slots = 4, .wave = 2, .waves = 6, .cached = 3});
  const auto programs = artifact_.load(driver_);
  // At load the slots have experts 0 to 2. The prompt's last tokens choose others: those of layer n stay.
  const auto routing = [](int layer) {
    Ids ids(static_cast<std::size_t>(StreamingArtifact::kTokens * StreamingArtifact::kTopK));
    for (std::size_t i = 0; i < ids.size(); ++i)
      ids[i] = i < 3 ? static_cast<int>(i) : layer + 5 + static_cast<int>(i % 3);
    return ids;
  };
  for (const Ids& left : prompt(*programs, routing)) EXPECT_TRUE(left.empty());
  EXPECT_EQ(programs->cache_statistics().kept, 3 * kLayers);
  EXPECT_EQ(programs->cache_statistics().bytes, 0);
  const auto after = [](int layer) { return Ids{layer + 5, layer + 7}; };
  artifact_.decode(*programs, after,
                   [](int, std::span<const std::int32_t>, bool skip) { EXPECT_TRUE(skip); });
  for (int layer = 0; layer < kLayers; ++layer)
    expect_sums(*programs, layer,
                [&](int expert) { return expert >= layer + 5 && expert <= layer + 7 ? 1 : 0; });
  EXPECT_EQ(programs->cache_statistics().hits, 2 * kLayers);
  EXPECT_EQ(programs->cache_statistics().misses, 0);
}

// Whatever the driver refuses the thread that fills the ring: the step is given up and the next one is right.
TEST_F(ExpertStreams, ARingThatTheDriverRefusesSomethingGivesTheStepUp) {
#ifdef __SANITIZE_THREAD__
  GTEST_SKIP() << "a graph that is given up reads slots while copies to them run; nobody reads its results";
#endif
  fake_.refuse_pinning = true;
  artifact_.write({.experts = 7, .slots = 2, .wave = 1, .waves = 7, .cached = 2});
  const auto programs = artifact_.load(driver_);
  const auto step = [&] { prompt(*programs, always({0, 1, 2, 3, 4, 5, 6})); };
  const int before = fake_.calls;
  step();
  const int calls = fake_.calls - before;
  int refused = 0;
  for (int call = 1; call <= calls; ++call) {
    fake_.fail_call = fake_.calls + call;
    try {
      step();
    } catch (const Error& error) {
      ++refused;
      EXPECT_NE(std::string(error.what()).find("failed"), std::string::npos) << error.what();
    }
    fake_.fail_call = 0;
    step();
    for (int layer = 0; layer < kLayers; ++layer) expect_sums(*programs, layer, [](int) { return 1; });
  }
  EXPECT_GT(refused, calls / 2);
}

// With times and without: the same step. The second graph has more nodes than a graph may have events.
TEST_P(PinnedOrNot, TimesAreTakenOfKernelsHandOversAndCopies) {
  for (const int waves : {1, 40}) {
    const int experts = 4 * waves;
    artifact_.write({.experts = experts, .waves = waves});
    const auto programs = artifact_.load(driver_);
    Ids all(static_cast<std::size_t>(StreamingArtifact::kTokens * StreamingArtifact::kTopK));
    for (std::size_t i = 0; i < all.size(); ++i) all[i] = static_cast<int>(i) % experts;
    for (const bool timed : {true, false, true}) {
      programs->set_timed(timed);
      const std::int64_t before = std::chrono::steady_clock::now().time_since_epoch().count();
      const std::int64_t bytes_before = programs->stream_statistics().bytes;
      prompt(*programs, always(all));
      const std::int64_t after = std::chrono::steady_clock::now().time_since_epoch().count();
      for (int layer = 0; layer < kLayers; ++layer)
        expect_sums(*programs, layer,
                    [&](int expert) { return expert < std::min<int>(experts, 40) ? 1 : 0; });
      const std::vector<GpuEvent> events = (*programs)[0].read_times();
      if (!timed) {
        EXPECT_TRUE(events.empty());
        continue;
      }
      std::map<GpuEvent::Kind, std::size_t> found;
      std::int64_t bytes = 0, launches = 0;
      for (const GpuEvent& event : events) {
        ++found[event.kind];
        bytes += static_cast<std::int64_t>(event.bytes);
        launches += event.launches;
        EXPECT_EQ(event.launches > 0, event.kind != GpuEvent::Kind::kCopy);
        EXPECT_EQ(event.kernel != nullptr, event.kind == GpuEvent::Kind::kKernel);
        EXPECT_LE(event.begin_ns, event.end_ns);
        // The clocks are put beside each other to some microseconds, on a machine that does other work too.
        EXPECT_GT(event.begin_ns, before - 1'000'000);
        EXPECT_LT(event.end_ns, after + 1'000'000);
      }
      EXPECT_EQ(bytes, programs->stream_statistics().bytes - bytes_before);
      // A layer raises a flag and awaits wave 0 at once, and so at the end of each wave.
      const int nodes = kLayers * (2 * waves + 1);
      EXPECT_EQ(launches, nodes) << waves;
      const std::size_t of_graph = found[GpuEvent::Kind::kKernel] + found[GpuEvent::Kind::kHandOver];
      EXPECT_EQ(of_graph, std::min<std::size_t>(nodes, kMostEvents - 1));
    }
  }
}

TEST_P(PinnedOrNot, AStepThatIsGivenUpLeavesTheNextOneRight) {
#ifdef __SANITIZE_THREAD__
  GTEST_SKIP() << "a graph that is given up reads slots while copies to them run; nobody reads its results";
#endif
  artifact_.write({.experts = 12, .slots = 4, .wave = 2, .waves = 6, .cached = 3});
  const auto programs = artifact_.load(driver_);
  for (int layer = 0; layer < kLayers; ++layer) {
    EXPECT_THROW(artifact_.prompt(*programs, always({3, 1}),
                                  [&](int at, std::span<const std::int32_t>, bool) {
                                    if (at == layer) throw std::domain_error("lane");
                                  }),
                 std::domain_error);
    prompt(*programs, always({0, 1, 2, 3, 4, 5, 6, 7, 8, 9, 10, 11}));
    for (int at = 0; at < kLayers; ++at) expect_sums(*programs, at, [](int) { return 1; });
  }
}

TEST_F(ExpertStreams, CopiesThatWaitForAGpuThatHangsAreGivenUpWithIt) {
#ifdef __SANITIZE_THREAD__
  GTEST_SKIP() << "copies go on to slots that the hanging GPU reads; nobody reads its results";
#endif
  artifact_.write({.experts = 12, .slots = 4, .wave = 2, .waves = 6});
  const auto programs = artifact_.load(
      driver_, true, {.patience = std::chrono::milliseconds(50), .drain = std::chrono::milliseconds(50)});
  fake_.hang = true;
  EXPECT_THROW(prompt(*programs, always({0, 1, 2, 3, 4, 5, 6, 7, 8, 9, 10, 11})), Error);
  fake_.hang = false;
}

TEST_F(ExpertStreams, WeightsThatAreTooSmallAreRefused) {
  const auto programs = artifact_.load(driver_, false);
  HostWeights small = artifact_.host_weights();
  small.weights[1] = small.weights[1].first(2 * 64);
  EXPECT_THROW(programs->attach(small), Error);
}

TEST_F(ExpertStreams, DamagedFilesAreRefusedByName) {
  const auto stream = [](Json& program) -> Json& { return program["stream"]; };
  const auto nodes = [](Json& program) -> Json& { return program["graphs"][0]["nodes"]; };
  expect_refused("slots", [&](Json& p) { stream(p)["slots"] = 0; });
  expect_refused("wave", [&](Json& p) { stream(p)["wave"] = 0; });
  expect_refused("wave", [&](Json& p) { stream(p)["wave"] = 9; });
  expect_refused("first_flag", [&](Json& p) { stream(p)["first_flag"] = kLayers - 1; });
  expect_refused("expert_bytes", [&](Json& p) { stream(p)["slots"] = 9; });
  expect_refused("buffer", [&](Json& p) { stream(p)["layers"][0]["operands"][0]["buffer"] = "x"; });
  expect_refused("hand_over", [&](Json& p) { stream(p)["layers"][1]["hand_over"] = 0; });
  expect_refused("hand_over", [&](Json& p) { stream(p)["layers"][2]["hand_over"] = kLayers; });
  expect_refused("waves", [&](Json& p) { stream(p)["layers"][1]["waves"] = 0; });
  expect_refused("waves", [&](Json& p) { stream(p)["layers"][1]["waves"] = 1 << 14; });
  expect_refused("experts",
                 [&](Json& p) { stream(p)["layers"][0]["operands"][0]["sources"][0]["experts"][0][1] = 5; });
  expect_refused("ids", [&](Json& p) { stream(p)["layers"][0]["ids"] = "in"; });
  expect_refused("part_offset", [&](Json& p) { stream(p)["tables"]["part_offset"] = 0; });
  expect_refused("row_bytes", [&](Json& p) { stream(p)["layers"][2]["waves"] = 2; });
  expect_refused("link_gb_per_s", [&](Json& p) { stream(p)["rates"]["link_gb_per_s"] = 0; });
  expect_refused("joint_gb_per_s", [&](Json& p) { stream(p)["rates"]["joint_gb_per_s"] = 1e-9; });
  expect_refused("spine_us", [&](Json& p) { stream(p)["layers"][0]["spine_us"] = Json::array(); });
  // The third layer's: its experts have come, they are computed, the CPU answers.
  Json pristine = artifact_.files().read("program.json");
  ASSERT_EQ(nodes(pristine).size(), 5U * kLayers);
  expect_refused("nodes", [&](Json& p) { nodes(p)[11]["hand_over"]["flag"] = 2; });
  expect_refused("nodes", [&](Json& p) { nodes(p)[13]["hand_over"]["flag"] = 2; });
  expect_refused("flag", [&](Json& p) { nodes(p)[11]["hand_over"]["flag"] = 2 * kLayers; });
  expect_refused("to", [&](Json& p) { nodes(p)[11]["hand_over"]["to"] = "cpu"; });
  expect_refused("to", [&](Json& p) { nodes(p)[13]["hand_over"]["to"] = "gpu:1"; });
}

}  // namespace
}  // namespace hetcomp::gpu
