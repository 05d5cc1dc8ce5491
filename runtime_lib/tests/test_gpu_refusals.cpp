// Machines that cannot run a GPU program, and files that must not: every one is refused with a sentence that
// names it.
#include <gtest/gtest.h>

#include <filesystem>
#include <fstream>
#include <functional>

#include "fake_gpu.h"
#include "file.h"
#include "gpu/cubin.h"
#include "status.h"

namespace hetcomp::gpu {
namespace {

namespace fs = std::filesystem;
using fake::FakeGpuArtifact;
using Json = nlohmann::json;

class GpuRefusals : public testing::Test {
 protected:
  ~GpuRefusals() override {
    fake::healthy_fake_cuda();
    EXPECT_EQ(fake_.live(), 0);
  }

  // Expects an error whose sentence has all of `words`.
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
  void expect_load_error(hetcomp_status status, const std::vector<std::string>& words) const {
    expect_error(status, words, [&] {
      const CudaDriver driver(FAKE_CUDA);
      const ProgramSet program(driver, artifact_.path(), FakeGpuArtifact::programs(), {});
    });
  }
  // Expects gpu/`name` to be refused after a change, with its path and `word`.
  void expect_bad(const std::string& name, const std::string& word,
                  const std::function<void(Json&)>& change) const {
    const Json good = artifact_.read(name);
    Json bad = good;
    change(bad);
    artifact_.write(name, bad);
    expect_load_error(HETCOMP_BAD_ARTIFACT, {word, name});
    artifact_.write(name, good);
  }
  void expect_bad_kernel(const std::string& word, const std::function<void(Json&)>& change) const {
    expect_bad("kernels.json", word, [&](Json& json) { change(json["kernels"][0]); });
  }
  void expect_bad_program(const std::string& word, const std::function<void(Json&)>& change) const {
    expect_bad("program.json", word, change);
  }
  // 0: add_one(input, out, n), 1: to the CPU, 3: to the GPU.
  void expect_bad_node(int node, const std::string& word, const std::function<void(Json&)>& change) const {
    expect_bad("program.json", word, [&](Json& json) { change(json["graphs"][0]["nodes"][node]); });
  }
  void expect_bad_argument(int argument, const std::string& word,
                           const std::function<void(Json&)>& change) const {
    expect_bad_node(0, word, [&](Json& node) { change(node["arguments"][argument]); });
  }

  FakeCuda& fake_ = fake::healthy_fake_cuda();
  FakeGpuArtifact artifact_;
};

TEST_F(GpuRefusals, NoDriver) {
  expect_error(HETCOMP_MISSING_ISA, {"no NVIDIA driver", "libnone.so.1", "install"},
               [] { const CudaDriver driver("libnone.so.1"); });
  expect_error(HETCOMP_MISSING_ISA, {"lacks", "cuDriverGetVersion"},
               [] { const CudaDriver driver("libm.so.6"); });
}

TEST_F(GpuRefusals, OldDriver) {
  fake_.version = 11060;
  expect_load_error(HETCOMP_MISSING_ISA, {"CUDA 11.6", "needs CUDA 12.0", "525"});
}

TEST_F(GpuRefusals, NoDevice) {
  fake_.devices = 0;
  expect_load_error(HETCOMP_MISSING_ISA, {"no GPU", "CUDA_VISIBLE_DEVICES"});
  fake_.devices = 1;
  expect_error(HETCOMP_MISSING_ISA, {"no GPU 1", "shows 1", "--gpu"}, [&] {
    const CudaDriver driver(FAKE_CUDA);
    GpuOptions second;
    second.devices = {1};
    const ProgramSet program(driver, artifact_.path(), FakeGpuArtifact::programs(), second);
  });
}

TEST_F(GpuRefusals, OtherArchitecture) {
  fake_.compute_capability = 86;
  expect_load_error(HETCOMP_MISSING_ISA, {"8.6", "for 9.0", "--cc 86", "Fake GPU"});
  fake_.compute_capability = 120;
  expect_load_error(HETCOMP_MISSING_ISA, {"12.0", "for 9.0", "--cc 120"});
  Json json = artifact_.read("kernels.json");
  json["kernels"] = Json::array();
  artifact_.write("kernels.json", json);
  expect_load_error(HETCOMP_MISSING_ISA, {"for none"});
}

TEST_F(GpuRefusals, CodeOfASmallerMinorVersionRuns) {
  fake_.compute_capability = 93;
  const CudaDriver driver(FAKE_CUDA);
  ProgramSet program(driver, artifact_.path(), FakeGpuArtifact::programs(), {});
  EXPECT_TRUE(artifact_.step_is_right(program, 1));
}

TEST_F(GpuRefusals, MemoryThatOthersUse) {
  fake_.free_bytes = 1 << 19;
  expect_load_error(HETCOMP_OUT_OF_MEMORY,
                    {"plan needs 1.0 MB", "524.3 KB free", "2.1 GB", "nvidia-smi", "--vram"});
}

TEST_F(GpuRefusals, MemoryTakenAfterTheCheck) {
  fake_.out_of_memory = true;
  expect_load_error(HETCOMP_OUT_OF_MEMORY, {"the buffer", "since the check"});
}

TEST_F(GpuRefusals, NoMemoryOperations) {
  fake_.memory_operations = false;
  expect_load_error(HETCOMP_MISSING_ISA,
                    {"memory operations", "cuGraphAddBatchMemOpNode", "update the driver"});
}

TEST_F(GpuRefusals, Cubins) {
  const fs::path cubin = artifact_.path() / "gpu" / "sm_90" / "a.cubin";
  const auto with_hash = [&] {
    Json json = artifact_.read("kernels.json");
    for (Json& kernel : json["kernels"]) kernel["sha256"] = File(cubin).sha256();
    artifact_.write("kernels.json", json);
  };
  fake::write_cubin(cubin, "add_one add scale fault other");
  expect_load_error(HETCOMP_BAD_ARTIFACT, {"a.cubin", "SHA-256"});
  fake::write_cubin(cubin, "add_one add");
  with_hash();
  expect_load_error(HETCOMP_BAD_ARTIFACT, {"a.cubin", "has no scale"});
  fake::write_cubin(cubin, "other_gpu");
  with_hash();
  expect_load_error(HETCOMP_MISSING_ISA, {"a.cubin", "does not load on Fake GPU", "--cc 90"});
  fs::resize_file(cubin, 50);
  with_hash();
  expect_load_error(HETCOMP_BAD_ARTIFACT, {"a.cubin", "truncated"});
  std::ofstream(cubin) << "#!/bin/sh\necho these are more than the sixty-four bytes of a header\n";
  with_hash();
  expect_load_error(HETCOMP_BAD_ARTIFACT, {"a.cubin", "not a cubin"});
  fs::resize_file(cubin, (64 << 20) + 1);
  expect_load_error(HETCOMP_BAD_ARTIFACT, {"a.cubin", "not the code of a kernel"});
  fs::remove(cubin);
  expect_load_error(HETCOMP_BAD_ARTIFACT, {"a.cubin", "lacks"});
  const FakeGpuArtifact other;
  fs::create_symlink(other.path() / "gpu" / "sm_90" / "a.cubin", cubin);
  expect_load_error(HETCOMP_BAD_ARTIFACT, {"a.cubin", "outside"});
}

// A section table that leads out of the file: the driver would read there.
TEST_F(GpuRefusals, CubinWithTablesOutside) {
  const fs::path cubin = artifact_.path() / "gpu" / "sm_90" / "a.cubin";
  const std::string good = File(cubin).text();
  const auto refused = [&](std::size_t at, std::uint64_t value, std::size_t size) {
    std::string bad = good + std::string(128, '\0');
    bad.replace(at, size, reinterpret_cast<const char*>(&value), size);
    return bad;
  };
  constexpr std::size_t kPhoff = 32, kShoff = 40, kPhentsize = 54, kPhnum = 56, kShentsize = 58, kShnum = 60;
  const auto expect = [](std::string bytes, std::size_t count_at, std::size_t size_at, std::uint16_t entry) {
    const std::uint16_t one = 1;
    bytes.replace(count_at, 2, reinterpret_cast<const char*>(&one), 2);
    bytes.replace(size_at, 2, reinterpret_cast<const char*>(&entry), 2);
    EXPECT_THROW(require_cubin(std::as_bytes(std::span(bytes)), "x.cubin"), Error);
  };
  for (const std::uint64_t offset : {std::uint64_t{1} << 20, ~std::uint64_t{0}, std::uint64_t{190}}) {
    expect(refused(kShoff, offset, 8), kShnum, kShentsize, 64);
    expect(refused(kPhoff, offset, 8), kPhnum, kPhentsize, 56);
  }
  expect(refused(kShoff, 64, 8), kShnum, kShentsize, 63);
  expect(refused(kPhoff, 64, 8), kPhnum, kPhentsize, 1);
}

TEST_F(GpuRefusals, KernelsFile) {
  const auto bad = [this](const std::string& word, const std::function<void(Json&)>& change) {
    expect_bad("kernels.json", word, change);
  };
  bad("schema", [](Json& j) { j.erase("schema"); });
  bad("schema", [](Json& j) { j["schema"] = {0, 3}; });
  bad("kernels must be a list", [](Json& j) { j["kernels"] = 5; });
  bad("kernels[5].name must be the only one", [](Json& j) { j["kernels"].push_back(j["kernels"][0]); });
  expect_bad_kernel("kernels[0].name must be present", [](Json& k) { k.erase("name"); });
  expect_bad_kernel("kernels[0].entry", [](Json& k) { k["entry"] = ""; });
  expect_bad_kernel("kernels[0].cc", [](Json& k) { k["cc"] = "90"; });
  expect_bad_kernel("kernels[0].cc", [](Json& k) { k["cc"] = 9; });
  expect_bad_kernel("kernels[0].file", [](Json& k) { k["file"] = "../../escape"; });
  expect_bad_kernel("kernels[0].file", [](Json& k) { k["file"] = "/etc/passwd"; });
  expect_bad_kernel("kernels[0].sha256", [](Json& k) { k["sha256"] = "12"; });
  expect_bad_kernel("kernels[0].num_warps", [](Json& k) { k["num_warps"] = 0; });
  expect_bad_kernel("kernels[0].num_warps", [](Json& k) { k["num_warps"] = 33; });
  expect_bad_kernel("kernels[0].shared_bytes", [](Json& k) { k["shared_bytes"] = -1; });
  expect_bad_kernel("kernels[0].global_scratch_bytes", [](Json& k) { k["global_scratch_bytes"] = ~0ULL; });
  expect_bad_kernel("kernels[0].arguments[0].type", [](Json& k) { k["arguments"][0]["type"] = "f64"; });
  Json newer = artifact_.read("kernels.json");
  newer["schema"] = {2, 0};
  artifact_.write("kernels.json", newer);
  expect_load_error(HETCOMP_NEWER_SCHEMA, {"kernels.json", "2.0"});
  std::ofstream(artifact_.path() / "gpu" / "kernels.json") << "{\"schema\": [1,";
  expect_load_error(HETCOMP_BAD_ARTIFACT, {"kernels.json", "not valid JSON"});
}

TEST_F(GpuRefusals, MoreSharedMemoryThanTheDeviceHas) {
  Json json = artifact_.read("kernels.json");
  json["kernels"][0]["shared_bytes"] = 200 << 10;
  artifact_.write("kernels.json", json);
  expect_load_error(HETCOMP_MISSING_ISA, {"add_one", "204800", "102400", "--cc 90"});
}

TEST_F(GpuRefusals, Buffers) {
  expect_bad_program("device_bytes", [](Json& p) { p["device_bytes"] = -1; });
  expect_bad_program("flags", [](Json& p) { p["flags"] = 5000; });
  expect_bad_program("buffers[0].bytes", [](Json& p) { p["buffers"][0]["bytes"] = 0; });
  expect_bad_program("buffers[0].bytes", [](Json& p) { p["buffers"][0]["bytes"] = ~0ULL; });
  expect_bad_program("buffers[0].kind", [](Json& p) { p["buffers"][0]["kind"] = "texture"; });
  expect_bad_program("buffers[1].name must be named once",
                     [](Json& p) { p["buffers"][1]["name"] = "input"; });
  expect_bad_program("buffers[0].sources must be absent",
                     [](Json& p) { p["buffers"][0]["sources"] = Json::array(); });
  expect_bad_program("buffers[7].sources must be present", [](Json& p) { p["buffers"][7].erase("sources"); });
  const auto bad_source = [this](const std::string& word, const std::string& key, const Json& value) {
    expect_bad_program(word, [&](Json& p) { p["buffers"][7]["sources"][0][key] = value; });
  };
  bad_source("sources[0].file", "file", "../weights.safetensors");
  bad_source("sources[0].bytes", "bytes", 257);
  bad_source("sources[0] must be inside the buffer", "to", 16);
  bad_source("xxh3_64", "xxh3_64", "xyz");
  expect_bad_program("sources[1].to", [](Json& p) {
    Json& sources = p["buffers"][7]["sources"];
    sources.push_back(sources[0]);
  });
}

// The buffer 8: two states of two slots and of the rows of nobody.
TEST_F(GpuRefusals, StatesOfRecurrences) {
  const auto expect = [this](const std::string& word, const std::function<void(Json&)>& change) {
    expect_bad_program(word, [&](Json& p) {
      p["buffers"].push_back(
          {{"name", "recurrent"},
           {"bytes", 448},
           {"kind", "recurrent"},
           {"recurrent",
            {{"slots", 2},
             {"states", {{{"offset", 0}, {"slot_bytes", 64}}, {{"offset", 256}, {"slot_bytes", 64}}}}}}});
      p["graphs"][0]["nodes"][0]["arguments"][0] = {{"buffer", "recurrent"}, {"offset", 256}};
      change(p["buffers"][8]);
    });
  };
  expect("buffers[8].recurrent must be present", [](Json& b) { b.erase("recurrent"); });
  expect("recurrent.slots", [](Json& b) { b["recurrent"]["slots"] = 0; });
  expect("recurrent.slots", [](Json& b) { b["recurrent"]["slots"] = 1 << 21; });
  expect("states must be a list of at least one", [](Json& b) { b["recurrent"]["states"] = Json::array(); });
  const auto bad_state = [&](const std::string& word, int state, const std::string& key, const Json& value) {
    expect(word, [&](Json& b) { b["recurrent"]["states"][state][key] = value; });
  };
  bad_state("states[1].offset", 1, "offset", 191);
  bad_state("states[1].offset", 1, "offset", 448);
  bad_state("states[0].slot_bytes", 0, "slot_bytes", 0);
  bad_state("states[0].slot_bytes", 0, "slot_bytes", ~0ULL);
  bad_state("states[1] must be of all slots and one more within the buffer (448 bytes)", 1, "slot_bytes", 65);
  bad_state("offset must be where one of the buffer's states begins", 1, "offset", 240);
  expect("recurrent must be absent: only", [](Json& b) { b["kind"] = "arena"; });
}

TEST_F(GpuRefusals, Weights) {
  const auto bad = [this](const std::string& key, const Json& value, const std::vector<std::string>& words) {
    const Json good = artifact_.read("program.json");
    Json json = good;
    json["buffers"][7]["sources"][0][key] = value;
    artifact_.write("program.json", json);
    expect_load_error(HETCOMP_BAD_ARTIFACT, words);
    artifact_.write("program.json", good);
  };
  bad("offset", 65, {"weights.safetensors", "lies beyond"});
  bad("offset", 1ULL << 45, {"weights.safetensors", "lies beyond"});
  bad("offset", 0, {"weights.safetensors", "does not have the hash"});
  bad("file", "other.safetensors", {"other.safetensors", "lacks"});
}

TEST_F(GpuRefusals, MemoryBeyondThePlan) {
  Json json = artifact_.read("program.json");
  json["device_bytes"] = 1000;
  artifact_.write("program.json", json);
  expect_load_error(HETCOMP_BAD_ARTIFACT,
                    {"256 bytes of the memory of Fake GPU (GPU 0)", "its 1.0 KB", "compile the model again"});
  Json kernels = artifact_.read("kernels.json");
  kernels["kernels"][2]["global_scratch_bytes"] = 1ULL << 32;
  artifact_.write("kernels.json", kernels);
  json["device_bytes"] = 1 << 20;
  artifact_.write("program.json", json);
  expect_load_error(HETCOMP_BAD_ARTIFACT, {"scratch memory of scale", "4.3 GB"});
}

TEST_F(GpuRefusals, Graphs) {
  expect_bad_program("graphs must be a list of at least one", [](Json& p) { p["graphs"] = Json::array(); });
  expect_bad_program("graphs[1].batch must be the only", [](Json& p) { p["graphs"][1]["batch"] = 1; });
  expect_bad_program("graphs[0].exact must be present", [](Json& p) { p["graphs"][0].erase("exact"); });
  expect_bad_program("graphs[0].exact must be true or false", [](Json& p) { p["graphs"][0]["exact"] = 1; });
  expect_bad_program("graphs[0].batch", [](Json& p) { p["graphs"][0]["batch"] = 0; });
  expect_bad_program("nodes must be a list of 1", [](Json& p) { p["graphs"][0]["nodes"] = Json::array(); });
  expect_bad_node(0, "without a cycle", [](Json& n) { n["after"] = {4}; });
  expect_bad_node(0, "without a cycle", [](Json& n) { n["after"] = {0}; });
  expect_bad_node(0, "after[0]", [](Json& n) { n["after"] = {16}; });
  expect_bad_node(0, "after[0]", [](Json& n) { n["after"] = {-1}; });
  expect_bad_node(0, "after must be present", [](Json& n) { n.erase("after"); });
  expect_bad_node(0, "kernel must be a kernel", [](Json& n) { n["kernel"] = "other"; });
  expect_bad_node(0, "grid", [](Json& n) { n["grid"] = {1, 1}; });
  expect_bad_node(0, "grid[0]", [](Json& n) { n["grid"] = {0, 1, 1}; });
  expect_bad_node(0, "grid[1]", [](Json& n) { n["grid"] = {1, 65536, 1}; });
  expect_bad_node(0, "arguments must be a list of 3", [](Json& n) { n["arguments"].erase(2); });
  expect_bad_argument(0, "arguments[0].buffer", [](Json& a) { a["buffer"] = "other"; });
  expect_bad_argument(0, "arguments[0].offset", [](Json& a) { a["offset"] = 256; });
  expect_bad_argument(0, "multiple of 16", [](Json& a) { a["offset"] = 8; });
  expect_bad_argument(0, "a buffer, for the kernel's argument x", [](Json& a) { a = {{"i32", 1}}; });
  expect_bad_argument(2, "a i32, for the kernel's argument n", [](Json& a) { a = {{"f32", 1.5}}; });
  expect_bad_argument(2, "i32 must be a whole number", [](Json& a) { a["i32"] = 1ULL << 31; });
  expect_bad_argument(2, "i32 must be a whole number", [](Json& a) { a["i32"] = ~0ULL; });
}

TEST_F(GpuRefusals, HandOvers) {
  expect_bad_node(1, "flag", [](Json& n) { n["hand_over"]["flag"] = 3; });
  expect_bad_node(1, "to must be cpu, or gpu:N", [](Json& n) { n["hand_over"]["to"] = "tpu"; });
  expect_bad_node(1, "to must be cpu, or gpu:N", [](Json& n) { n["hand_over"]["to"] = "gpu:1x"; });
  expect_bad_node(1, "from or to gpu:0", [](Json& n) { n["hand_over"]["from"] = "gpu:1"; });
  expect_bad_node(1, "from or to gpu:0", [](Json& n) { n["hand_over"]["to"] = "gpu:0"; });
  expect_bad_program("device must be gpu:N", [](Json& p) { p["device"] = "cpu"; });
  expect_bad_program("which is no longer read", [](Json& p) { p["schema"] = {1, 0}; });
  expect_bad_node(6, "the only one of its flag", [](Json& n) { n["hand_over"]["flag"] = 0; });
  expect_bad_node(3, "after the hand-over of the same flag", [](Json& n) { n["after"] = {0}; });
  expect_bad_program("nodes[3].hand_over must be after the hand-over of the same flag", [](Json& p) {
    Json& nodes = p["graphs"][0]["nodes"];
    nodes[1] = nodes[0];
  });
  expect_bad_program("the program has no flags", [](Json& p) { p["flags"] = 0; });
}

TEST_F(GpuRefusals, HandOversOfKernels) {
  const auto flag = [](int number, const char* from, const char* to) {
    return Json{{"flag", number}, {"from", from}, {"to", to}};
  };
  expect_bad_argument(0, "flag", [&](Json& a) { a = flag(3, "cpu", "gpu:0"); });
  expect_bad_argument(0, "from or to gpu:0", [&](Json& a) { a = flag(0, "gpu:1", "cpu"); });
  expect_bad_argument(2, "a i32, for the kernel's argument n", [&](Json& a) { a = flag(0, "cpu", "gpu:0"); });
  expect_bad_program("nodes[1].hand_over must be the only one of its flag",
                     [&](Json& p) { p["graphs"][0]["nodes"][0]["arguments"][0] = flag(0, "gpu:0", "cpu"); });
  expect_bad_argument(0, "nodes[0].arguments must be after the hand-over of the same flag",
                      [&](Json& a) { a = flag(0, "cpu", "gpu:0"); });
  Json program = artifact_.read("program.json");
  Json& nodes = program["graphs"][0]["nodes"];
  nodes[4]["arguments"][0] = flag(0, "cpu", "gpu:0");  // once more, behind the asking
  artifact_.write("program.json", program);
  const CudaDriver driver(FAKE_CUDA);
  EXPECT_NO_THROW(ProgramSet(driver, artifact_.path(), FakeGpuArtifact::programs(), {}));
  for (const int node : {1, 3}) {  // nobody asks
    const Json after = nodes[node]["after"];
    nodes[node] = nodes[0];
    nodes[node]["after"] = after;
  }
  artifact_.write("program.json", program);
  expect_load_error(HETCOMP_BAD_ARTIFACT,
                    {"hand-over 0 of batch size", "awaited from the CPU, which is not asked"});
}

}  // namespace
}  // namespace hetcomp::gpu
