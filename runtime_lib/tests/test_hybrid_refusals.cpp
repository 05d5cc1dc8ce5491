// Machines that cannot run a model which needs a GPU, and artifacts of one whose parts do not fit each other.
#include <dlfcn.h>
#include <gtest/gtest.h>

#include <cstdio>
#include <cstdlib>
#include <functional>
#include <memory>
#include <stdexcept>

#include "cli/handles.h"
#include "fake_gpu.h"
#include "fake_hybrid.h"
#include "hetcomp/hetcomp.h"

namespace hetcomp {
namespace {

using cli::check;
using fake::FakeHybrid;
using Json = nlohmann::json;

hetcomp_load_options options() {
  hetcomp_load_options options;
  hetcomp_load_options_init(&options);
  return options;
}

// Expects the load to be refused with all of `words`.
void expect_refused(const FakeHybrid& artifact, hetcomp_status status, const std::vector<std::string>& words,
                    const hetcomp_load_options& options) {
  hetcomp_model* model = nullptr;
  EXPECT_EQ(hetcomp_load(artifact.path().c_str(), &options, &model), status) << hetcomp_last_error();
  hetcomp_model_free(model);
  for (const std::string& word : words)
    EXPECT_NE(std::string(hetcomp_last_error()).find(word), std::string::npos)
        << "'" << word << "' is not in: " << hetcomp_last_error();
}

class HybridRefusals : public testing::Test {
 protected:
  ~HybridRefusals() override {
    fake::healthy_fake_cuda();
    EXPECT_EQ(fake_.live(), 0);
  }
  void expect_bad_program(const std::string& word, const std::function<void(Json&)>& change) {
    const Json good = artifact_.program();
    Json bad = good;
    change(bad);
    artifact_.write_program(bad);
    expect_refused(artifact_, HETCOMP_BAD_ARTIFACT, {word}, options());
    artifact_.write_program(good);
  }
  void expect_bad_manifest(const std::string& word, const std::function<void(Json&)>& change) {
    const Json good = artifact_.artifact().manifest();
    Json bad = good;
    change(bad);
    artifact_.artifact().write_manifest(bad);
    expect_refused(artifact_, HETCOMP_BAD_ARTIFACT, {word}, options());
    artifact_.artifact().write_manifest(good);
  }
  // The buffer of program.json.
  static Json& buffer(Json& program, const std::string& name) {
    for (Json& each : program["buffers"])
      if (each["name"] == name) return each;
    throw std::out_of_range(name);
  }

  FakeCuda& fake_ = fake::healthy_fake_cuda();
  FakeHybrid artifact_;
};

TEST_F(HybridRefusals, Machines) {
  hetcomp_load_options second = options();
  constexpr std::int32_t kSecond = 1;
  second.n_gpus = 1;
  second.gpus = &kSecond;
  expect_refused(artifact_, HETCOMP_MISSING_ISA, {"no GPU 1", "shows 1", "--gpu"}, second);
  fake_.devices = 2;
  hetcomp_model* model = nullptr;
  check(hetcomp_load(artifact_.path().c_str(), &second, &model));
  hetcomp_model_free(model);
  fake_.compute_capability = 86;
  expect_refused(artifact_, HETCOMP_MISSING_ISA, {"8.6", "compile the model with --cc 86"}, options());
  fake::healthy_fake_cuda().free_bytes = 1 << 19;
  expect_refused(artifact_, HETCOMP_OUT_OF_MEMORY, {"nvidia-smi", "--vram"}, options());
}

// In a process of its own, which gtest starts for this test alone: this one has the fake driver.
TEST(HybridRefusalsDeathTest, MachineWithoutADriver) {
  testing::FLAGS_gtest_death_test_style = "threadsafe";
  constexpr const char* kArtifact = "HETCOMP_TEST_ARTIFACT";
  std::unique_ptr<FakeHybrid> artifact;
  if (std::getenv(kArtifact) == nullptr) {
    artifact = std::make_unique<FakeHybrid>();
    setenv(kArtifact, artifact->path().c_str(), 1);
  }
  const auto load_there = [] {
    if (dlopen("libcuda.so.1", RTLD_NOW) != nullptr) {
      std::fputs("this machine has a driver", stderr);
      std::_Exit(HETCOMP_MISSING_ISA);
    }
    hetcomp_model* model = nullptr;
    const hetcomp_status status = hetcomp_load(std::getenv(kArtifact), nullptr, &model);
    std::fputs(hetcomp_last_error(), stderr);
    std::_Exit(status);
  };
  EXPECT_EXIT(load_there(), testing::ExitedWithCode(HETCOMP_MISSING_ISA),
              "no NVIDIA driver .*: install it|this machine has a driver");
  unsetenv(kArtifact);
}

TEST_F(HybridRefusals, AdaptersAtRunTime) {
  hetcomp_model* model = nullptr;
  ASSERT_EQ(hetcomp_load(artifact_.path().c_str(), nullptr, &model), HETCOMP_OK) << hetcomp_last_error();
  EXPECT_EQ(hetcomp_adapter_load(model, "any.hetlora", "any"), HETCOMP_INVALID_ARGUMENT);
  EXPECT_NE(std::string(hetcomp_last_error()).find("with the adapter merged"), std::string::npos);
  char* json = nullptr;
  ASSERT_EQ(hetcomp_adapter_list(model, &json), HETCOMP_OK);
  EXPECT_STREQ(json, "[]");
  hetcomp_free(json);
  hetcomp_model_free(model);
}

TEST_F(HybridRefusals, StepBuffers) {
  for (const char* name :
       {"ids", "positions", "slots", "logit_rows", "rows", "logit_row_count", "inverse_temperatures"}) {
    expect_bad_program(std::string("the step buffer ") + name + ", not ",
                       [&](Json& p) { buffer(p, name)["bytes"] = 12; });
  }
  expect_bad_program("the step buffer other, which nobody fills", [](Json& p) {
    p["buffers"].push_back({{"name", "other"}, {"bytes", 4}, {"kind", "step"}});
  });
}

TEST_F(HybridRefusals, StatesOfRecurrences) {
  const auto with_states_of = [](Json& p, int slots) {
    const Json states{{{"offset", 0}, {"slot_bytes", 64}}};
    p["buffers"].push_back({{"name", "recurrent"},
                            {"bytes", 64 * (slots + 1)},
                            {"kind", "recurrent"},
                            {"recurrent", {{"slots", slots}, {"states", states}}}});
  };
  constexpr int kSlots = fake::FakeArtifact::kMaxBatch;
  expect_bad_program(
      "recurrences of " + std::to_string(kSlots + 1) + " sequences, not of " + std::to_string(kSlots),
      [&](Json& p) { with_states_of(p, kSlots + 1); });
  Json good = artifact_.program();
  with_states_of(good, kSlots);
  artifact_.write_program(good);
  hetcomp_model* model = nullptr;
  check(hetcomp_load(artifact_.path().c_str(), nullptr, &model));
  hetcomp_model_free(model);
}

TEST_F(HybridRefusals, PinnedBuffers) {
  expect_bad_program("bytes for the buffer logits, not 1940",
                     [](Json& p) { buffer(p, "logits")["bytes"] = 97 * 4; });
  expect_bad_program("bytes for the buffer best, not 20", [](Json& p) { buffer(p, "best")["bytes"] = 4; });
  expect_bad_program("bytes for the buffer candidates, not 66112",
                     [](Json& p) { buffer(p, "candidates")["bytes"] = 4; });
  expect_bad_program("a buffer candidates that is not pinned",
                     [](Json& p) { buffer(p, "candidates")["kind"] = "arena"; });
  expect_bad_program("a buffer logits that is not a result",
                     [](Json& p) { buffer(p, "logits")["kind"] = "arena"; });
  expect_bad_program("no pinned buffer x", [](Json& p) { buffer(p, "x")["kind"] = "arena"; });
  expect_bad_manifest("no pinned buffer ids", [](Json& m) { m["pinned"][2] = "ids"; });
  expect_bad_manifest("no pinned buffer none", [](Json& m) { m["pinned"][2] = "none"; });
}

TEST_F(HybridRefusals, GraphsThatDoNotFitTheProgramOrTheSteps) {
  expect_bad_program("3 hand-overs, the CPU's program 2", [](Json& p) { p["flags"] = 3; });
  expect_bad_program("batch size 4 that makes 1 of the 2 hand-overs", [](Json& p) {
    Json& nodes = p["graphs"][1]["nodes"];
    for (const int node : {5, 6}) {
      nodes[node].erase("hand_over");
      nodes[node] = nodes[4];
      nodes[node]["after"] = {node - 1};
    }
  });
  expect_bad_program("batch size 6, a step has at most 5 rows", [](Json& p) { p["graphs"][1]["batch"] = 6; });
  expect_bad_program("batch size 8, a step has at most 7 rows", [](Json& p) { p["graphs"][2]["batch"] = 8; });
}

TEST_F(HybridRefusals, ManifestSection) {
  expect_bad_manifest("weights-00001.safetensors must be given with a sha256",
                      [](Json& m) { m.erase("gpus"); });
  expect_bad_manifest("buffers to share with GPUs", [](Json& m) {
    m.erase("gpus");
    m["files"].erase("weights-00001.safetensors");
  });
  expect_bad_manifest("buffers to share with GPUs", [](Json& m) { m["pinned"].erase(3); });
  expect_bad_manifest("gpus must be a list", [](Json& m) { m["gpus"] = 1; });
  expect_bad_manifest("gpus[0].program must be present", [](Json& m) { m["gpus"][0].erase("program"); });
  expect_bad_manifest("at least one GPU", [](Json& m) { m["gpus"] = Json::array(); });
  expect_bad_manifest("gpus[1].device must be named once",
                      [](Json& m) { m["gpus"].push_back(Json(m["gpus"][0])); });
  expect_bad_manifest("which is no longer read", [](Json& m) { m["gpu"] = m["gpus"][0]; });
  expect_bad_manifest("gpus[0].program must be one of the names in \"files\"",
                      [](Json& m) { m["files"].erase("gpu/program.json"); });
  expect_bad_manifest("gpus[0].program must be a file with a sha256",
                      [](Json& m) { m["files"]["gpu/program.json"].erase("sha256"); });
  expect_bad_manifest("gpu/kernels.json with a sha256",
                      [](Json& m) { m["files"].erase("gpu/kernels.json"); });
  expect_bad_manifest("gpu/kernels.json with a sha256",
                      [](Json& m) { m["files"]["gpu/kernels.json"].erase("sha256"); });
  expect_bad_manifest("pinned must be present", [](Json& m) { m.erase("pinned"); });
  expect_bad_manifest("pinned", [](Json& m) { m["pinned"] = "x"; });
  expect_bad_manifest("pinned[1] must be named once", [](Json& m) { m["pinned"][1] = "x"; });
  expect_bad_manifest("pinned[1] must be a string", [](Json& m) { m["pinned"][1] = 1; });
  expect_bad_manifest("gpus[0].weight_files must be present",
                      [](Json& m) { m["gpus"][0].erase("weight_files"); });
  expect_bad_manifest("gpus[0].weight_files[0] must be one of the names",
                      [](Json& m) { m["gpus"][0]["weight_files"][0] = "none"; });
  // Nothing but weights may go without a hash.
  expect_bad_manifest("weights-00001.safetensors must be given with a sha256",
                      [](Json& m) { m["gpus"][0]["weight_files"] = Json::array(); });
  expect_bad_manifest("embed.cubin must be given with a sha256",
                      [](Json& m) { m["files"]["gpu/embed.cubin"].erase("sha256"); });
  expect_bad_manifest("does not have the SHA-256",
                      [](Json& m) { m["files"]["gpu/program.json"]["sha256"] = std::string(64, '0'); });
}

TEST_F(HybridRefusals, HandOversThatTheCpusProgramDoesNotKnow) {
  const FakeHybrid alone(FakeHybrid::Parts::kGpu);
  Json program = alone.program();
  program["flags"] = 1;
  for (Json& graph : program["graphs"]) {
    Json& nodes = graph["nodes"];
    nodes.push_back(
        {{"hand_over", {{"flag", 0}, {"from", "gpu:0"}, {"to", "cpu"}}}, {"after", {nodes.size() - 1}}});
  }
  alone.write_program(program);
  expect_refused(alone, HETCOMP_BAD_ARTIFACT, {"1 hand-overs, the CPU's program 0"}, options());
}

TEST_F(HybridRefusals, ProgramOfAnotherGpu) {
  fake_.devices = 2;
  expect_bad_manifest("gpu/program.json is for gpu:0, not gpu:1",
                      [](Json& m) { m["gpus"][0]["device"] = "gpu:1"; });
}

TEST_F(HybridRefusals, DamagedWeightOfTheGpu) {
  const auto file = artifact_.artifact().file("weights-00001.safetensors");
  std::string bytes = fake::read_file(file);
  bytes[100] ^= 1;
  fake::write_file(file, bytes);
  expect_refused(artifact_, HETCOMP_BAD_ARTIFACT,
                 {"embed", "weights-00001.safetensors", "copy the artifact anew"}, options());
  hetcomp_load_options trusting = options();
  trusting.verify_weights = 0;
  hetcomp_model* model = nullptr;
  check(hetcomp_load(artifact_.path().c_str(), &trusting, &model));
  hetcomp_model_free(model);
}

}  // namespace
}  // namespace hetcomp
