// Adapters on GPUs: their places, and what program.json says of them.
#include <gtest/gtest.h>

#include <functional>

#include "fake_gpu.h"
#include "gpu/adapter_slots.h"
#include "status.h"

namespace hetcomp::gpu {
namespace {

using Json = nlohmann::json;
using Bytes = std::vector<std::uint64_t>;

TEST(AdapterSlots, GivesTheFirstGapThatIsLargeEnough) {
  AdapterSlots slots(4, {100, 1000});
  auto first = slots.take({40, 10});
  auto second = slots.take({30, 10});
  ASSERT_TRUE(first && second);
  EXPECT_EQ((std::pair{first->slot, first->begin}), (std::pair{0, Bytes{0, 0}}));
  EXPECT_EQ((std::pair{second->slot, second->begin}), (std::pair{1, Bytes{40, 10}}));
  EXPECT_EQ(slots.take({40, 10}), nullptr);  // 30 are left of the first GPU
  EXPECT_TRUE(slots.possible({100, 1000}));
  EXPECT_FALSE(slots.possible({101, 0}));
  first.reset();
  const auto third = slots.take({35, 990 - 20});
  ASSERT_TRUE(third);
  EXPECT_EQ((std::pair{third->slot, third->begin}), (std::pair{0, Bytes{0, 20}}));
}

TEST(AdapterSlots, AnAdapterThatChangesOneGpuTakesNothingOfTheOther) {
  AdapterSlots slots(3, {64, 64});
  const auto first = slots.take({64, 0});
  const auto second = slots.take({0, 64});
  ASSERT_TRUE(first && second);
  EXPECT_EQ(slots.take({1, 0}), nullptr);
  const auto third = slots.take({0, 0});
  ASSERT_TRUE(third);
  EXPECT_EQ(slots.take({0, 0}), nullptr);  // no slot is left
}

TEST(AdapterSlots, PlacesOutliveIt) {
  std::shared_ptr<const AdapterPlace> place;
  {
    AdapterSlots slots(1, {64});
    place = slots.take({64});
  }
  EXPECT_EQ(place->slot, 0);
}

class GpuAdapters : public testing::Test {
 protected:
  void SetUp() override {
    program_ = artifact_.read("program.json");
    program_["buffers"].push_back({{"name", "pairs"}, {"bytes", 4096}, {"kind", "pairs"}});
    program_["buffers"].push_back({{"name", "pair_table"}, {"bytes", 2 * 3 * 32}, {"kind", "pairs"}});
    Json adapted = program_["graphs"];
    for (Json& graph : adapted) {
      graph["adapted"] = true;
      program_["graphs"].push_back(graph);
    }
    const Json weight{{"name", "w"},   {"matrices", 1}, {"rows", 64},
                      {"columns", 64}, {"halves", 1},   {"number_bytes", 2}};
    program_["adapters"] = {{"slots", 3},
                            {"rank", 8},
                            {"experts", true},
                            {"pairs", "pairs"},
                            {"table", {{"buffer", "pair_table"}, {"row_bytes", 3 * 32}}},
                            {"weights", {weight}}};
    artifact_.write("program.json", program_);
  }
  void expect_refused(const std::string& word, const std::function<void(Json&)>& change) const {
    Json bad = program_;
    change(bad);
    artifact_.write("program.json", bad);
    try {
      const ProgramSet programs(driver_, artifact_.path(), fake::FakeGpuArtifact::programs(), {});
      FAIL() << "'" << word << "' was not refused";
    } catch (const Error& error) {
      EXPECT_EQ(error.status(), HETCOMP_BAD_ARTIFACT);
      EXPECT_NE(std::string(error.what()).find(word), std::string::npos) << error.what();
    }
  }

  FakeCuda& fake_ = fake::healthy_fake_cuda();
  const CudaDriver driver_{FAKE_CUDA};
  const fake::FakeGpuArtifact artifact_;
  Json program_;
};

TEST_F(GpuAdapters, AStepRunsTheGraphThatItAsksFor) {
  ProgramSet programs(driver_, artifact_.path(), fake::FakeGpuArtifact::programs(), {});
  ASSERT_EQ(programs.adaptable().size(), 1U);
  EXPECT_EQ(programs.adaptable()[0].rank, 8);
  EXPECT_TRUE(artifact_.step_is_right(programs, 5));
  programs.run(2, [](HandShake&) {}, 1, true, true);
  std::vector<std::uint8_t> numbers(1024);
  const GpuPair pair{0, {8, 2.0F, numbers.data(), numbers.data()}, 1024, 1024};
  programs[0].put_adapter(2, 2048, {&pair, 1});
  EXPECT_TRUE(artifact_.step_is_right(programs, 7));
}

TEST_F(GpuAdapters, ThereIsNoAdaptedGraphWithoutRoom) {
  program_.erase("adapters");
  Json& graphs = program_["graphs"];
  graphs.erase(graphs.begin() + 2, graphs.end());
  artifact_.write("program.json", program_);
  ProgramSet programs(driver_, artifact_.path(), fake::FakeGpuArtifact::programs(), {});
  EXPECT_TRUE(programs.adaptable().empty());
  EXPECT_THROW(programs.run(2, [](HandShake&) {}, 1, true, true), Error);
}

TEST_F(GpuAdapters, DamagedProgramsAreRefused) {
  expect_refused("adapted must be false", [](Json& p) { p.erase("adapters"); });
  expect_refused("as many of each", [](Json& p) { p["graphs"].erase(p["graphs"].begin()); });
  expect_refused("the only graph", [](Json& p) { p["graphs"][2]["adapted"] = false; });
  expect_refused("of kind pairs", [](Json& p) { p["adapters"]["pairs"] = "x"; });
  expect_refused("slots", [](Json& p) { p["adapters"]["slots"] = 0; });
  expect_refused("row_bytes", [](Json& p) { p["adapters"]["slots"] = 2; });
  expect_refused("less one", [](Json& p) { p["adapters"]["weights"] = Json::array(); });
  expect_refused("2 or 4", [](Json& p) { p["adapters"]["weights"][0]["number_bytes"] = 3; });
  expect_refused("whole halves", [](Json& p) {
    p["adapters"]["weights"][0]["halves"] = 2;
    p["adapters"]["weights"][0]["rows"] = 63;
  });
}

}  // namespace
}  // namespace hetcomp::gpu
