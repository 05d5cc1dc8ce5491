// GPU programs end to end on the fake driver: results, hand-overs, faults. Meant to be run under
// ThreadSanitizer too.
#include <gtest/gtest.h>

#include <atomic>
#include <stdexcept>
#include <thread>

#include "fake_gpu.h"
#include "file.h"
#include "status.h"

namespace hetcomp::gpu {
namespace {

using fake::FakeGpuArtifact;
using std::chrono::milliseconds;

class GpuPrograms : public testing::Test {
 protected:
  ~GpuPrograms() override { EXPECT_EQ(fake_.live(), 0); }

  // Expects run() to fail with a sentence that has `word`.
  static void expect_failure(ProgramSet& program, const std::string& word,
                             const std::function<void(HandShake&)>& cpu_work) {
    try {
      program.run(1, cpu_work);
      FAIL() << "no error";
    } catch (const Error& error) {
      EXPECT_EQ(error.status(), HETCOMP_COMPUTE);
      EXPECT_NE(std::string(error.what()).find(word), std::string::npos) << error.what();
    }
  }
  std::function<void(HandShake&)> answering(const ProgramSet& program) const {
    return [&](HandShake& hand_shake) { artifact_.answer_all(program, hand_shake); };
  }

  FakeCuda& fake_ = fake::healthy_fake_cuda();
  FakeGpuArtifact artifact_;
  CudaDriver driver_{FAKE_CUDA};
  GpuOptions quick_{.patience = milliseconds(60), .drain = milliseconds(2000)};
};

TEST_F(GpuPrograms, RightResults) {
  ProgramSet program(driver_, artifact_.path(), FakeGpuArtifact::programs(), {});
  for (int step = 0; step < 50; ++step) {
    fake_.reverse = step % 2 == 1;
    ASSERT_TRUE(artifact_.step_is_right(program, static_cast<float>(step))) << step;
  }
}

// A leak shows in the counts after any number. On a busy machine each hand-over waits for the scheduler.
constexpr int kManySteps = 1000;

TEST_F(GpuPrograms, ManyStepsOfTwoGraphsWithoutALeak) {
  ProgramSet program(driver_, artifact_.path(), FakeGpuArtifact::programs(), {});
  const int live = fake_.live();
  const std::size_t bytes = fake_.device_bytes;
  for (int step = 0; step < kManySteps; ++step) {
    const auto first = static_cast<float>(step % 100);
    ASSERT_TRUE(artifact_.step_is_right(program, first, 1)) << step;
    ASSERT_TRUE(step % 16 != 0 || artifact_.step_is_right(program, first, 2)) << step;
  }
  EXPECT_EQ(fake_.live(), live);
  EXPECT_EQ(fake_.device_bytes, bytes);
}

TEST_F(GpuPrograms, TakesNoMoreThanItsFigure) {
  fake_.device_bytes = 0;
  const ProgramSet program(driver_, artifact_.path(), FakeGpuArtifact::programs(), {});
  EXPECT_EQ(program.device_bytes(), fake_.device_bytes);
  // x, shared, cache, weight, the step's input, scratch of three layers.
  EXPECT_EQ(program.device_bytes(), 8 * FakeGpuArtifact::kWidth * sizeof(float));
}

TEST_F(GpuPrograms, NodesInALineShareTheirScratch) {
  nlohmann::json json = artifact_.read("program.json");
  for (nlohmann::json& graph : json["graphs"]) {
    nlohmann::json before = nlohmann::json::array();
    for (std::size_t i = 0; i < graph["nodes"].size(); ++i) {
      graph["nodes"][i]["after"] = before;
      before = {i};
    }
  }
  artifact_.write("program.json", json);
  ProgramSet program(driver_, artifact_.path(), FakeGpuArtifact::programs(), {});
  // As above, but one scratch instead of three.
  EXPECT_EQ(program.device_bytes(), 6 * FakeGpuArtifact::kWidth * sizeof(float));
  EXPECT_TRUE(artifact_.step_is_right(program, 1));
}

TEST_F(GpuPrograms, AskingAndAwaitingInOneNodeWhereNothingIsBetween) {
  nlohmann::json json = artifact_.read("program.json");
  auto& nodes = json["graphs"][0]["nodes"];
  const std::size_t count = nodes.size();
  json["graphs"].erase(1);
  artifact_.write("program.json", json);
  {
    ProgramSet program(driver_, artifact_.path(), FakeGpuArtifact::programs(), {});
    EXPECT_EQ(fake_.nodes, static_cast<int>(count) - 3);
    EXPECT_TRUE(artifact_.step_is_right(program, 1));
  }
  nodes[4]["after"].push_back(1);  // another node comes after asking: now the two are apart
  artifact_.write("program.json", json);
  ProgramSet program(driver_, artifact_.path(), FakeGpuArtifact::programs(), {});
  EXPECT_EQ(fake_.nodes, static_cast<int>(count) - 2);
  EXPECT_TRUE(artifact_.step_is_right(program, 1));
}

TEST_F(GpuPrograms, CpuThatNeverAnswers) {
  ProgramSet program(driver_, artifact_.path(), FakeGpuArtifact::programs(), quick_);
  expect_failure(program, "was not answered", [](HandShake&) {});
  EXPECT_TRUE(artifact_.step_is_right(program, 4));
}

TEST_F(GpuPrograms, AbortWhileTheCpuWaits) {
  ProgramSet program(driver_, artifact_.path(), FakeGpuArtifact::programs(), {});
  fake_.hang = true;
  std::jthread other([&] {
    std::this_thread::sleep_for(milliseconds(20));
    program.abort("The user has had enough.");
    fake_.hang = false;
  });
  expect_failure(program, "had enough", answering(program));
  other.join();
  EXPECT_TRUE(artifact_.step_is_right(program, 4));
  program.abort("Nothing runs: nothing happens.");
  EXPECT_TRUE(artifact_.step_is_right(program, 5));
}

TEST_F(GpuPrograms, AbortWhileTheCpuComputesForEver) {
  ProgramSet program(driver_, artifact_.path(), FakeGpuArtifact::programs(), {});
  std::jthread other([&] {
    std::this_thread::sleep_for(milliseconds(20));
    program.abort("The user has had enough.");
  });
  expect_failure(program, "had enough", [](HandShake& hand_shake) {
    EXPECT_TRUE(hand_shake.wait_for_gpu(0));
    while (!hand_shake.aborted()) std::this_thread::yield();
    EXPECT_FALSE(hand_shake.wait_for_gpu(1));
  });
  EXPECT_TRUE(artifact_.step_is_right(program, 4));
}

TEST_F(GpuPrograms, CpuWorkThatThrows) {
  ProgramSet program(driver_, artifact_.path(), FakeGpuArtifact::programs(), {});
  const auto begin = HandShake::Clock::now();
  EXPECT_THROW(program.run(1, [](HandShake&) { throw std::domain_error("lane"); }), std::domain_error);
  EXPECT_LT(HandShake::Clock::now() - begin, std::chrono::seconds(10));  // patience is 30 s
  EXPECT_TRUE(artifact_.step_is_right(program, 4));
}

TEST_F(GpuPrograms, GpuThatIsLate) {
  ProgramSet program(driver_, artifact_.path(), FakeGpuArtifact::programs(), quick_);
  fake_.hang = true;
  std::jthread other([&] {
    std::this_thread::sleep_for(milliseconds(300));
    fake_.hang = false;
  });
  expect_failure(program, "hand-over 0 within 60 ms", answering(program));
  other.join();
  EXPECT_TRUE(artifact_.step_is_right(program, 4));
}

TEST_F(GpuPrograms, GpuThatHangs) {
  quick_.drain = milliseconds(50);
  {
    ProgramSet program(driver_, artifact_.path(), FakeGpuArtifact::programs(), quick_);
    fake_.hang = true;
    expect_failure(program, "hand-over 0", answering(program));
    expect_failure(program, "did not come to rest", answering(program));
    fake_.hang = false;
  }
  EXPECT_EQ(fake_.live(), 0);
  ProgramSet again(driver_, artifact_.path(), FakeGpuArtifact::programs(), {});
  EXPECT_TRUE(artifact_.step_is_right(again, 4));
}

TEST_F(GpuPrograms, FaultInTheMiddle) {
  nlohmann::json json = artifact_.read("program.json");
  auto& node = json["graphs"][0]["nodes"][4];
  node["kernel"] = "fault";
  node["arguments"].erase(node["arguments"].begin() + 1, node["arguments"].end());
  artifact_.write("program.json", json);
  {
    ProgramSet program(driver_, artifact_.path(), FakeGpuArtifact::programs(), {});
    expect_failure(program, "illegal memory access", answering(program));
    expect_failure(program, "load the model anew", answering(program));
  }
  const FakeGpuArtifact good;
  ProgramSet program(driver_, good.path(), FakeGpuArtifact::programs(), {});
  EXPECT_TRUE(good.step_is_right(program, 4));
}

TEST_F(GpuPrograms, HandOverThatTheGraphLacks) {
  ProgramSet program(driver_, artifact_.path(), FakeGpuArtifact::programs(), {});
  try {
    program.run(2, answering(program));
    FAIL() << "no error";
  } catch (const Error& error) {
    EXPECT_NE(std::string(error.what()).find("come to their end without it"), std::string::npos)
        << error.what();
  }
  EXPECT_TRUE(artifact_.step_is_right(program, 4));
}

// A kernel that the fake driver does not know: y = 2 * x, run by this test.
TEST_F(GpuPrograms, ForeignKernel) {
  static std::string text;
  const auto loader = [](const void* image, std::size_t bytes) {
    text.assign(static_cast<const char*>(image) + 64, bytes - 64);
    return 7;
  };
  const auto launcher = [](int id, const unsigned* grid, int n, const std::uint64_t* values) {
    if (id != 7 || grid[0] != 2 || grid[1] != 1 || n != 5) return 1;
    for (std::size_t i = 0; i < values[2]; ++i)
      reinterpret_cast<float*>(values[1])[i] = 2 * reinterpret_cast<const float*>(values[0])[i];
    return 0;
  };
  const std::filesystem::path cubin = artifact_.path() / "gpu" / "sm_90" / "foreign.cubin";
  fake::write_cubin(cubin, "foreign twice 8 8 4\nmore");
  nlohmann::json kernels = artifact_.read("kernels.json");
  nlohmann::json& twice = kernels["kernels"].emplace_back(kernels["kernels"][0]);
  twice["name"] = twice["entry"] = "twice";
  twice["file"] = "sm_90/foreign.cubin";
  twice["sha256"] = File(cubin).sha256();
  artifact_.write("kernels.json", kernels);
  nlohmann::json json = artifact_.read("program.json");
  auto& node = json["graphs"][1]["nodes"][0];
  node["kernel"] = "twice";
  node["grid"] = {2, 1, 1};
  node["arguments"] = {{{"buffer", "input"}, {"offset", 0}},
                       {{"buffer", "y"}, {"offset", 0}},
                       {{"i32", FakeGpuArtifact::kWidth}}};
  artifact_.write("program.json", json);
  EXPECT_THROW(ProgramSet(driver_, artifact_.path(), FakeGpuArtifact::programs(), {}),
               Error);  // nobody loads it
  fake::set_foreign_kernels(loader, launcher);
  {
    ProgramSet program(driver_, artifact_.path(), FakeGpuArtifact::programs(), {});
    EXPECT_EQ(text, std::string("foreign twice 8 8 4\nmore\0", 25));
    reinterpret_cast<float*>(program.host("input").data())[9] = 21;
    program.run(2, [](HandShake&) {});
    EXPECT_EQ(reinterpret_cast<const float*>(program.host("y").data())[9], 42);
  }
  fake::set_foreign_kernels([](const void*, std::size_t) { return -1; }, launcher);
  EXPECT_THROW(ProgramSet(driver_, artifact_.path(), FakeGpuArtifact::programs(), {}), Error);
  fake::set_foreign_kernels(nullptr, nullptr);
}

TEST_F(GpuPrograms, NamesThatAreNotThere) {
  ProgramSet program(driver_, artifact_.path(), FakeGpuArtifact::programs(), {});
  EXPECT_THROW(program.run(3, answering(program)), Error);
  EXPECT_THROW(program.host("weight"), Error);
  EXPECT_THROW(program.host("other"), Error);
}

// Whichever call fails, there is an error, nothing stays behind, and the next load works.
TEST_F(GpuPrograms, EveryCallMayFail) {
  int failures = 0;
  for (int call = 1;; ++call) {
    fake_.calls = 0;
    fake_.fail_call = call;
    try {
      ProgramSet program(driver_, artifact_.path(), FakeGpuArtifact::programs(), {});
      EXPECT_TRUE(artifact_.step_is_right(program, 4));
      if (fake_.calls < call) break;
      ADD_FAILURE() << "call " << call << " failed without an error";
    } catch (const Error& error) {
      ++failures;
      EXPECT_NE(std::string(error.what()).find("fake error"), std::string::npos) << error.what();
    }
    ASSERT_EQ(fake_.live(), 0) << "after call " << call << " failed";
  }
  EXPECT_GT(failures, 40);
}

TEST_F(GpuPrograms, LaunchThatFailsOnce) {
  ProgramSet program(driver_, artifact_.path(), FakeGpuArtifact::programs(), {});
  fake_.calls = 0;
  fake_.fail_call = 2;  // the copy of the step, then the launch
  expect_failure(program, "cuGraphLaunch", answering(program));
  EXPECT_TRUE(artifact_.step_is_right(program, 4));
}

}  // namespace
}  // namespace hetcomp::gpu
