// Programs with slots for experts on the fake driver: what the CPU is told in a step, pinning, faults, and
// files that are refused. Meant to be run under ThreadSanitizer too.
#include <gtest/gtest.h>

#include <functional>
#include <stdexcept>

#include "fake_gpu.h"
#include "status.h"

namespace hetcomp::gpu {
namespace {

using fake::FakeGpuArtifact;
using Json = nlohmann::json;

// The fake artifact, each of whose layers has four experts of 64 bytes and two slots; a token chooses one.
// Its graphs wait for nothing that is streamed, as those of decoding.
class CachedPrograms : public testing::Test {
 protected:
  static constexpr int kLayers = 3, kExperts = 4, kSlots = 2;
  static constexpr std::uint64_t kExpertBytes = 64;
  static constexpr std::size_t kWidth = FakeGpuArtifact::kWidth;

  CachedPrograms() {
    Json program = artifact_.read("program.json");
    Json streamed = Json::array(), cached = Json::array();
    const Json curve = Json::array({Json::array({1, 1.0})});
    for (int i = 0; i < kLayers; ++i) {
      const Json source{{"weight", i}, {"experts", {{0, kExperts}}}};
      streamed.push_back(
          {{"hand_over", i},
           {"experts", kExperts},
           {"top_k", 1},
           {"hidden", kWidth},
           {"ids", "routing"},
           {"waves", kExperts - kSlots},
           {"spine_us", curve},
           {"operands", {{{"buffer", "ring"}, {"expert_bytes", kExpertBytes}, {"sources", {source}}}}}});
      cached.push_back({{"sum", "in"},
                        {"first", {0, 1}},
                        {"operands", {{{"buffer", "slots"}, {"offset", i * kSlots * kExpertBytes}}}}});
    }
    program["stream"] = {
        {"slots", 1},
        {"wave", 1},
        {"first_flag", kLayers},
        {"tables", {{"buffer", "tables"}, {"row_bytes", 48}, {"part_offset", 16}, {"ask_offset", 32}}},
        {"rates",
         {{"link_gb_per_s", 1.0},
          {"joint_gb_per_s", 2.0},
          {"cpu_expert_us", curve},
          {"gpu_expert_us", curve}}},
        {"layers", streamed}};
    program["expert_cache"] = {{"policy", "lru"},
                               {"slots", kSlots},
                               {"bytes_per_step", 1 << 20},
                               {"table", {{"buffer", "cached"}, {"row_bytes", 16}}},
                               {"layers", cached}};
    const auto buffer = [&](const std::string& name, std::uint64_t bytes, const std::string& kind) {
      program["buffers"].push_back({{"name", name}, {"bytes", bytes}, {"kind", kind}});
    };
    buffer("ring", kExpertBytes, "stream");
    buffer("tables", 48 * (3 * kLayers + 1), "stream");
    buffer("slots", kLayers * kSlots * kExpertBytes, "stream");
    buffer("cached", 16 * kLayers, "stream");
    buffer("routing", 16, "pinned_out");
    artifact_.write("program.json", program);
  }
  ~CachedPrograms() override {
    fake_.refuse_pinning = false;
    fake_.most_pinned = SIZE_MAX;
    EXPECT_EQ(fake_.live(), 0);
  }

  HostWeights host_weights() const {
    const std::span all(weights_.data(), weights_.size());
    return {.weights = {all, all, all}, .regions = {all}};
  }
  std::unique_ptr<ProgramSet> load() const {
    auto programs =
        std::make_unique<ProgramSet>(driver_, artifact_.path(), FakeGpuArtifact::programs(), GpuOptions{});
    EXPECT_EQ(programs->attach(host_weights()).not_pinned.empty(), !fake_.refuse_pinning);
    programs->fill_caches(host_weights());
    return programs;
  }

  // A token of which every layer chooses that expert. Returns in how many layers the CPU has it.
  int step(ProgramSet& programs, std::int32_t expert, int fails_at = kLayers) const {
    int left = 0;
    programs.run(1, [&](HandShake& hand_shake) {
      std::int32_t& id = *reinterpret_cast<std::int32_t*>(programs.host("routing").data());
      for (std::uint32_t layer = 0; layer < kLayers; ++layer) {
        if (!hand_shake.wait_for_gpu(layer)) return;
        if (static_cast<int>(layer) == fails_at) throw std::domain_error("lane");
        id = expert;
        programs.route(layer);
        EXPECT_EQ(programs.skip()[layer], id == -1 ? 1 : 0);
        left += id == expert ? 1 : 0;
        if (id == expert) FakeGpuArtifact::compute(programs, static_cast<int>(layer));
        hand_shake.answer(layer);
      }
    });
    return left;
  }
  void expect_refused(const std::string& word, const std::function<void(Json&)>& change) {
    const Json good = artifact_.read("program.json");
    Json bad = good;
    change(bad["expert_cache"]);
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
  FakeGpuArtifact artifact_{kLayers};
  CudaDriver driver_{FAKE_CUDA};
  std::vector<std::uint8_t> weights_ = std::vector<std::uint8_t>(kExperts * kExpertBytes);
};

TEST_F(CachedPrograms, ExpertsInSlotsAreTakenFromTheCpuAndOthersComeIntoThem) {
  const auto programs = load();
  EXPECT_TRUE(programs->streams() && programs->caches());
  EXPECT_EQ(step(*programs, 1), 0);
  for (std::int64_t n = 0; n < CachePolicy::kLruMargin; ++n) EXPECT_EQ(step(*programs, 3), kLayers);
  EXPECT_EQ(step(*programs, 3), 0);
  const CacheStatistics found = programs->cache_statistics();
  EXPECT_EQ(found.hits, 2 * kLayers);
  EXPECT_EQ(found.misses, CachePolicy::kLruMargin * kLayers);
  EXPECT_EQ(found.swaps, kLayers);
  EXPECT_EQ(found.bytes, kLayers * static_cast<std::int64_t>(kExpertBytes));
  programs->reset_statistics();
  EXPECT_EQ(programs->cache_statistics().hits, 0);
}

TEST_F(CachedPrograms, AStepThatIsGivenUpLeavesNoLayerSkipped) {
  const auto programs = load();
  for (int layer = 0; layer < kLayers; ++layer) {
    EXPECT_THROW(step(*programs, 1, layer), std::domain_error);
    for (int i = 0; i < kLayers; ++i) EXPECT_EQ(programs->skip()[i], 0);
    EXPECT_EQ(step(*programs, 1), 0);
  }
}

TEST_F(CachedPrograms, WhereMemoryCannotBePinnedExpertsComeThroughARing) {
  fake_.refuse_pinning = true;
  const auto programs = load();
  for (std::int64_t n = 0; n <= CachePolicy::kLruMargin; ++n) step(*programs, 3);
  EXPECT_EQ(step(*programs, 3), 0);
  EXPECT_EQ(programs->cache_statistics().swaps, kLayers);
}

// A copy of a mapped file that could not be read is no expert.
TEST_F(CachedPrograms, ExpertsThatWereNotReadDoNotComeIntoSlots) {
  ProgramSet programs(driver_, artifact_.path(), FakeGpuArtifact::programs(), {});
  HostWeights weights = host_weights();
  bool good = true;
  weights.good = [&] { return good; };
  programs.attach(weights);
  programs.fill_caches(weights);
  for (std::int64_t n = 0; n < CachePolicy::kLruMargin; ++n) step(programs, 3);
  good = false;
  step(programs, 3);  // under which they are copied
  good = true;
  EXPECT_EQ(programs.cache_statistics().swaps, 0);
  EXPECT_EQ(step(programs, 3), kLayers);
  EXPECT_EQ(step(programs, 3), 0);
  good = false;
  EXPECT_THROW(programs.fill_caches(weights), Error);
}

TEST_F(CachedPrograms, WithoutMemoryForTheRingTheSlotsKeepWhatTheyHave) {
  fake_.refuse_pinning = true;
  fake_.most_pinned = 1 << 20;
  const auto programs = load();
  for (int n = 0; n < 40; ++n) EXPECT_EQ(step(*programs, 3), kLayers);
  EXPECT_EQ(step(*programs, 0), 0);
  EXPECT_EQ(programs->cache_statistics().swaps, 0);
}

TEST_F(CachedPrograms, DamagedFilesAreRefusedByName) {
  expect_refused("policy", [](Json& c) { c["policy"] = "mru"; });
  expect_refused("slots", [](Json& c) { c["slots"] = kExperts + 1; });
  expect_refused("bytes_per_step", [](Json& c) { c["bytes_per_step"] = -1; });
  expect_refused("buffer", [](Json& c) { c["table"]["buffer"] = "routing"; });
  expect_refused("row_bytes", [](Json& c) { c["table"]["row_bytes"] = 32; });
  expect_refused("row_bytes", [](Json& c) { c["table"]["row_bytes"] = 8; });
  expect_refused("layers", [](Json& c) { c["layers"].erase(2); });
  expect_refused("sum", [](Json& c) { c["layers"][1]["sum"] = "routing"; });
  expect_refused("first", [](Json& c) { c["layers"][1]["first"] = {0, 0}; });
  expect_refused("first", [](Json& c) { c["layers"][1]["first"] = {0, kExperts}; });
  expect_refused("first", [](Json& c) { c["layers"][1]["first"] = {0, 1, 2}; });
  expect_refused("operands", [](Json& c) { c["layers"][1]["operands"] = Json::array(); });
  expect_refused("offset", [](Json& c) { c["layers"][2]["operands"][0]["offset"] = 5 * kExpertBytes; });
  expect_refused("offset", [](Json& c) { c["layers"][0]["operands"][0]["offset"] = 8; });
}

TEST_F(CachedPrograms, ACacheNeedsAStream) {
  Json program = artifact_.read("program.json");
  program.erase("stream");
  artifact_.write("program.json", program);
  EXPECT_THROW(load(), Error);
}

}  // namespace
}  // namespace hetcomp::gpu
