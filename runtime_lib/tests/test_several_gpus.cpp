// Programs of two GPUs that work on one step, on the fake driver, which refuses what belongs to the other
// device.
#include <gtest/gtest.h>

#include <array>
#include <functional>
#include <thread>

#include "fake_gpu.h"
#include "gpu/program_set.h"
#include "status.h"

namespace hetcomp::gpu {
namespace {

using fake::buffer;
using fake::FakeGpuArtifact;
using Json = nlohmann::json;
using std::chrono::milliseconds;

constexpr std::size_t kRowBytes = FakeGpuArtifact::kWidth * sizeof(float);

Json hand_over(int flag, const std::string& from, const std::string& to) {
  return {{"hand_over", {{"flag", flag}, {"from", from}, {"to", to}}}};
}
Json add_one(const std::string& x, const std::string& y) {
  return {{"kernel", "add_one"},
          {"grid", {1, 1, 1}},
          {"arguments", {buffer(x), buffer(y), {{"i32", FakeGpuArtifact::kWidth}}}}};
}
Json add(const std::string& a, const std::string& b, const std::string& y) {
  return {{"kernel", "add"},
          {"grid", {1, 1, 1}},
          {"arguments", {buffer(a), buffer(b), buffer(y), {{"i32", FakeGpuArtifact::kWidth}}}}};
}

Json program(const std::string& device, const std::vector<std::pair<std::string, std::string>>& buffers,
             std::vector<Json> nodes) {
  for (std::size_t i = 0; i < nodes.size(); ++i)
    nodes[i]["after"] = i == 0 ? Json::array() : Json::array({i - 1});
  Json list = Json::array();
  for (const auto& [name, kind] : buffers)
    list.push_back({{"name", name}, {"bytes", kRowBytes}, {"kind", kind}});
  return {{"schema", {5, 0}},        {"device", device},
          {"device_bytes", 1 << 20}, {"flags", 3},
          {"buffers", list},         {"graphs", {{{"batch", 1}, {"exact", true}, {"nodes", nodes}}}}};
}

// gpu:0: there = input + 1; gpu:1: out = there + input; CPU: in = 3 * out; gpu:1: back = in + there;
// gpu:0: y = back + input. Of each GPU the inputs are its own.
class SeveralGpus : public testing::Test {
 protected:
  SeveralGpus() {
    fake_.devices = 2;
    artifact_.write(
        "program.json",
        program("gpu:0",
                {{"input", "step"}, {"there", "pinned_out"}, {"back", "pinned_in"}, {"y", "pinned_out"}},
                {add_one("input", "there"), hand_over(0, "gpu:0", "gpu:1"), hand_over(2, "gpu:1", "gpu:0"),
                 add("back", "input", "y")}));
    artifact_.write("program-1.json", program("gpu:1",
                                              {{"input", "step"},
                                               {"there", "pinned_in"},
                                               {"x", "arena"},
                                               {"out", "pinned_out"},
                                               {"in", "pinned_in"},
                                               {"back", "pinned_out"}},
                                              {hand_over(0, "gpu:0", "gpu:1"), add("there", "input", "out"),
                                               hand_over(1, "gpu:1", "cpu"), hand_over(1, "cpu", "gpu:1"),
                                               add("in", "there", "x"), add("x", "input", "back"),
                                               hand_over(2, "gpu:1", "gpu:0")}));
  }
  ~SeveralGpus() override {
    EXPECT_EQ(fake_.live(), 0);
    fake::healthy_fake_cuda();
  }

  static std::vector<ProgramFile> files() {
    return {{"gpu:0", "gpu/program.json"}, {"gpu:1", "gpu/program-1.json"}};
  }
  ProgramSet load(const GpuOptions& options = {}) const {
    return {driver_, artifact_.path(), files(), options};
  }

  static std::span<float> floats(std::span<std::byte> bytes) {
    return {reinterpret_cast<float*>(bytes.data()), bytes.size() / sizeof(float)};
  }
  static void answer(const ProgramSet& programs, HandShake& hand_shake) {
    if (!hand_shake.wait_for_gpu(1)) return;
    for (std::size_t i = 0; i < FakeGpuArtifact::kWidth; ++i)
      floats(programs.host("in"))[i] = 3 * floats(programs.host("out"))[i];
    hand_shake.answer(1);
  }
  static bool step_is_right(ProgramSet& programs, float first) {
    for (std::size_t i = 0; i < FakeGpuArtifact::kWidth; ++i) {
      floats(programs[0].host("input"))[i] = first + static_cast<float>(i);
      floats(programs[1].host("input"))[i] = 2 * first;
    }
    programs.run(1, [&](HandShake& hand_shake) { answer(programs, hand_shake); });
    for (std::size_t i = 0; i < FakeGpuArtifact::kWidth; ++i) {
      const float zero = first + static_cast<float>(i);
      const float there = zero + 1;
      const float back = 3 * (there + 2 * first) + there + 2 * first;
      if (floats(programs.host("y"))[i] != back + zero) return false;
    }
    return true;
  }
  static void expect_error(hetcomp_status status, const std::vector<std::string>& words,
                           const std::function<void()>& call) {
    try {
      call();
      FAIL() << "no error; expected " << words[0];
    } catch (const Error& error) {
      EXPECT_EQ(error.status(), status) << error.what();
      for (const std::string& word : words)
        EXPECT_NE(std::string(error.what()).find(word), std::string::npos)
            << "'" << word << "' is not in: " << error.what();
    }
  }
  void expect_bad(const std::string& file, const std::string& word,
                  const std::function<void(Json&)>& change) const {
    const Json good = artifact_.read(file);
    Json bad = good;
    change(bad);
    artifact_.write(file, bad);
    expect_error(HETCOMP_BAD_ARTIFACT, {word, "compile the model again"}, [&] { load(); });
    artifact_.write(file, good);
  }

  FakeCuda& fake_ = fake::healthy_fake_cuda();
  FakeGpuArtifact artifact_;
  CudaDriver driver_{FAKE_CUDA};
};

TEST_F(SeveralGpus, RightResultsInAnyOrderOfTheirNodes) {
  ProgramSet programs = load();
  const int live = fake_.live();
  for (int step = 0; step < 100; ++step) {
    fake_.reverse = step % 2 == 1;
    ASSERT_TRUE(step_is_right(programs, static_cast<float>(step))) << step;
  }
  EXPECT_EQ(fake_.live(), live);
  EXPECT_EQ(programs[0].device().name, "Fake GPU");
  EXPECT_EQ(programs[1].device().name, "Fake GPU 2");
}

TEST_F(SeveralGpus, NumbersOfTheUser) {
  fake_.devices = 4;
  {
    ProgramSet programs = load({{3, 1}});
    EXPECT_EQ(programs[0].device().name, "Fake GPU 4");
    EXPECT_EQ(programs[1].device().name, "Fake GPU 2");
    EXPECT_TRUE(step_is_right(programs, 1));
  }
  ProgramSet both = load({{0, 0}});  // one GPU does the work of two
  EXPECT_TRUE(step_is_right(both, 2));
}

TEST_F(SeveralGpus, MachinesThatLackOne) {
  fake_.devices = 1;
  expect_error(HETCOMP_MISSING_ISA, {"no GPU 1", "shows 1", "--gpu"}, [&] { load(); });
  fake_.devices = 2;
  expect_error(HETCOMP_MISSING_ISA, {"no GPU 2", "shows 2"}, [&] { load({{0, 2}}); });
  expect_error(HETCOMP_INVALID_ARGUMENT, {"for 2 GPUs, 1 are given", "--gpu 0,1"}, [&] { load({{0}}); });
  fake_.taken_of_others = (std::size_t{1} << 30) - 1000;
  expect_error(HETCOMP_OUT_OF_MEMORY, {"Fake GPU 2 (GPU 1) has 1.0 KB free", "nvidia-smi"}, [&] { load(); });
}

TEST_F(SeveralGpus, ProgramsThatDoNotFitEachOther) {
  const auto nodes = [](Json& p) -> Json& { return p["graphs"][0]["nodes"]; };
  expect_bad("program-1.json", "gpu:0 has 3 hand-overs, gpu:1 4", [](Json& p) { p["flags"] = 4; });
  expect_bad("program-1.json", "gpu:1 has 2 graphs, not 1", [](Json& p) {
    p["graphs"].push_back(Json(p["graphs"][0]));
    p["graphs"][1]["batch"] = 2;
  });
  expect_bad("program-1.json", "no graph for batch size 1", [](Json& p) { p["graphs"][0]["batch"] = 2; });
  expect_bad("program-1.json", "gpu/program-1.json is for gpu:2, not gpu:1", [](Json& p) {
    p["device"] = "gpu:2";
    for (Json& node : p["graphs"][0]["nodes"])
      if (node.contains("hand_over"))
        for (const char* end : {"from", "to"})
          if (node["hand_over"][end] == "gpu:1") node["hand_over"][end] = "gpu:2";
  });
  expect_bad("program.json", "hand-over 2 of batch size 1 is not awaited by gpu:0", [&](Json& p) {
    nodes(p)[2] = nodes(p)[0];
    nodes(p)[2]["after"] = {1};
  });
  expect_bad("program.json", "hand-over 0 of batch size 1 is awaited by gpu:1, but not made by gpu:0",
             [&](Json& p) {
               nodes(p)[1] = nodes(p)[0];
               nodes(p)[1]["after"] = {0};
             });
  expect_bad("program.json", "hand-over 1 of batch size 1 is made twice",
             [&](Json& p) { nodes(p)[1]["hand_over"] = {{"flag", 1}, {"from", "gpu:0"}, {"to", "cpu"}}; });
  expect_bad("program-1.json", "do not agree on the size of the buffer there",
             [](Json& p) { p["buffers"][1]["bytes"] = 2 * kRowBytes; });
}

TEST_F(SeveralGpus, FaultOfOneEndsTheStepOfAll) {
  Json json = artifact_.read("program-1.json");
  Json& node = json["graphs"][0]["nodes"][1];
  node["kernel"] = "fault";
  node["arguments"] = {buffer("x")};
  artifact_.write("program-1.json", json);
  ProgramSet programs = load();
  const auto answering = [&](HandShake& hand_shake) { answer(programs, hand_shake); };
  const auto begin = HandShake::Clock::now();
  expect_error(HETCOMP_COMPUTE, {"Fake GPU 2 (GPU 1)", "illegal memory access", "load the model anew"},
               [&] { programs.run(1, answering); });
  EXPECT_LT(HandShake::Clock::now() - begin, std::chrono::seconds(10));  // patience is 30 s
  expect_error(HETCOMP_COMPUTE, {"Fake GPU 2 (GPU 1)", "runs no more steps"},
               [&] { programs.run(1, answering); });
}

TEST_F(SeveralGpus, StepsThatAreGivenUp) {
  GpuOptions quick;
  quick.patience = milliseconds(60);
  ProgramSet programs = load(quick);
  expect_error(HETCOMP_COMPUTE, {"Fake GPU (GPU 0) and Fake GPU 2 (GPU 1) did not come to the end"},
               [&] { programs.run(1, [](HandShake&) {}); });
  EXPECT_TRUE(step_is_right(programs, 4));
  EXPECT_THROW(programs.run(1, [](HandShake&) { throw std::domain_error("lane"); }), std::domain_error);
  EXPECT_TRUE(step_is_right(programs, 5));
  fake_.hang = true;
  std::jthread other([&] {
    std::this_thread::sleep_for(milliseconds(20));
    programs.abort("The user has had enough.");
    fake_.hang = false;
  });
  expect_error(HETCOMP_COMPUTE, {"had enough"},
               [&] { programs.run(1, [&](HandShake& hand_shake) { answer(programs, hand_shake); }); });
  other.join();
  EXPECT_TRUE(step_is_right(programs, 6));
}

// Whichever call fails, at load or in a step, there is an error, and nothing stays behind.
TEST_F(SeveralGpus, EveryCallMayFail) {
  int failures = 0;
  for (int call = 1;; ++call) {
    fake_.calls = 0;
    fake_.fail_call = call;
    try {
      ProgramSet programs = load();
      EXPECT_TRUE(step_is_right(programs, 4));
      if (fake_.calls < call) break;
      ADD_FAILURE() << "call " << call << " failed without an error";
    } catch (const Error& error) {
      ++failures;
      EXPECT_NE(std::string(error.what()).find("fake error"), std::string::npos) << error.what();
    }
    ASSERT_EQ(fake_.live(), 0) << "after call " << call << " failed";
  }
  EXPECT_GT(failures, 50);
}

}  // namespace
}  // namespace hetcomp::gpu
