// Hostile and damaged artifacts: every one is refused with a sentence, none is executed, none crashes.
#include <gtest/gtest.h>

#include <filesystem>
#include <functional>
#include <random>

#include "cpu_isa.h"
#include "fake_artifact.h"
#include "hetcomp/hetcomp.h"
#include "manifest.h"
#include "program_library.h"
#include "status.h"

namespace hetcomp {
namespace {

namespace fs = std::filesystem;
using fake::FakeArtifact;
using Json = nlohmann::json;

hetcomp_status load(const FakeArtifact& artifact, const hetcomp_load_options* options = nullptr) {
  hetcomp_model* model = nullptr;
  const hetcomp_status status = hetcomp_load(artifact.path().c_str(), options, &model);
  hetcomp_model_free(model);
  return status;
}

// The status of a load after `change`, with the sentence checked for `word`.
void expect_refused(hetcomp_status expected, const std::string& word,
                    const std::function<void(Json&)>& change) {
  const FakeArtifact artifact;
  Json manifest = artifact.manifest();
  change(manifest);
  artifact.write_manifest(manifest);
  EXPECT_EQ(load(artifact), expected) << hetcomp_last_error();
  EXPECT_NE(std::string(hetcomp_last_error()).find(word), std::string::npos)
      << "'" << word << "' is not in: " << hetcomp_last_error();
}

void expect_bad(const std::string& word, const std::function<void(Json&)>& change) {
  expect_refused(HETCOMP_BAD_ARTIFACT, word, change);
}

TEST(BadArtifact, TheUnchangedOneLoads) {
  const FakeArtifact artifact;
  EXPECT_EQ(load(artifact), HETCOMP_OK) << hetcomp_last_error();
}

TEST(BadArtifact, Schema) {
  expect_refused(HETCOMP_NEWER_SCHEMA, "schema 2.0", [](Json& m) { m["schema"] = {2, 0}; });
  expect_bad("schema", [](Json& m) { m["schema"] = {0, 9}; });
  expect_bad("schema", [](Json& m) { m["schema"] = "1.0"; });
  expect_bad("schema", [](Json& m) { m.erase("schema"); });
  const FakeArtifact newer_minor;
  Json manifest = newer_minor.manifest();
  manifest["schema"] = {1, 99};
  manifest["unknown"] = "ignored";
  newer_minor.write_manifest(manifest);
  EXPECT_EQ(load(newer_minor), HETCOMP_OK) << hetcomp_last_error();
}

TEST(BadArtifact, Numbers) {
  expect_bad("model.vocab", [](Json& m) { m["model"]["vocab"] = 0; });
  expect_bad("model.vocab", [](Json& m) { m["model"]["vocab"] = -1; });
  expect_bad("model.vocab", [](Json& m) { m["model"]["vocab"] = 97.0; });
  expect_bad("model.vocab", [](Json& m) { m["model"]["vocab"] = "97"; });
  expect_bad("model.context", [](Json& m) { m["model"]["context"] = 1ULL << 40; });
  expect_bad("model.max_batch", [](Json& m) { m["model"]["max_batch"] = 2000000000; });
  expect_bad("model.eos_token_ids", [](Json& m) { m["model"]["eos_token_ids"] = 5; });
  expect_bad("bytes_per_slot", [](Json& m) { m["states"][0]["bytes_per_slot"] = ~0ULL; });
  expect_bad("vocabulary entries", [](Json& m) { m["model"]["vocab"] = 98; });
  expect_bad("tokens a step", [](Json& m) { m["model"]["max_tokens"] = 700; });
  expect_bad("states", [](Json& m) { m["states"] = Json::array(); });
  expect_bad("weights", [](Json& m) { m["weights"].erase(1); });
  expect_bad("on_demand", [](Json& m) { m["weights"][0]["on_demand"] = 1; });
}

TEST(BadArtifact, Nodes) {
  const auto two = [](Json& m) {
    m["nodes"] = {0, 1};
    m["main_node"] = 0;
  };
  expect_bad("NUMA nodes", two);  // the program was made for one
  expect_bad("nodes", [](Json& m) { m["nodes"] = Json::array(); });
  expect_bad("nodes", [](Json& m) { m["nodes"] = 2; });
  expect_bad("nodes[0]", [](Json& m) { m["nodes"] = {-1}; });
  expect_bad("nodes[0]", [](Json& m) { m["nodes"] = {1U << 20}; });
  expect_bad("nodes[1]", [](Json& m) { m["nodes"] = {0, 0}; });
  expect_bad("main_node", [](Json& m) { m["nodes"] = {0}; });
  expect_bad("main_node", [](Json& m) {
    m["nodes"] = {0};
    m["main_node"] = 1;
  });
  expect_bad("weights[1].node", [](Json& m) { m["weights"][1]["node"] = 1; });
  expect_bad("weights[1].node", [](Json& m) { m["weights"][1]["node"] = "0"; });
  expect_bad("weights[0].node", [&](Json& m) {
    two(m);
    m["weights"][0]["node"] = 2;
  });
  expect_bad("1 to 64 NUMA nodes", [](Json& m) {
    m["nodes"] = Json::array();
    for (int id = 0; id < 65; ++id) m["nodes"].push_back(id);
    m["main_node"] = 0;
  });
}

TEST(BadArtifact, MoreMemoryThanThereIs) {
  expect_refused(HETCOMP_OUT_OF_MEMORY, "KV cache",
                 [](Json& m) { m["states"][0]["bytes_per_slot"] = 1ULL << 50; });
}

TEST(BadArtifact, WeightsOutsideTheirFile) {
  expect_bad("offset", [](Json& m) { m["weights"][1]["offset"] = 1ULL << 40; });
  expect_bad("weights[1]", [](Json& m) { m["weights"][1]["bytes"] = 4096; });
  expect_bad("weights[1].bytes", [](Json& m) { m["weights"][1]["bytes"] = ~0ULL; });
  expect_bad("multiple of 64", [](Json& m) { m["weights"][0]["offset"] = 65; });
  expect_bad("weights[0].file", [](Json& m) { m["weights"][0]["file"] = "other.safetensors"; });
  expect_bad("xxh3_64", [](Json& m) { m["weights"][0]["xxh3_64"] = "xyz"; });
}

TEST(BadArtifact, PathsThatLeaveTheArtifact) {
  const std::string sha(64, '0');
  for (const std::string& name : {std::string("../escape"), std::string("/etc/passwd"),
                                  std::string("a/../../b"), std::string(), std::string("a\0b", 3)}) {
    expect_bad("relative path inside", [&](Json& m) { m["files"][name] = {{"bytes", 1}, {"sha256", sha}}; });
  }
  const FakeArtifact outside;
  const FakeArtifact artifact;
  fs::remove(artifact.file("plan.json"));
  fs::create_symlink(outside.file("plan.json"), artifact.file("plan.json"));
  EXPECT_EQ(load(artifact), HETCOMP_BAD_ARTIFACT);
  EXPECT_NE(std::string(hetcomp_last_error()).find("outside"), std::string::npos) << hetcomp_last_error();
}

TEST(BadArtifact, FilesThatAreNotWhatTheManifestSays) {
  expect_bad("sha256", [](Json& m) { m["files"]["kernels/lib.so"].erase("sha256"); });
  expect_bad("sha256", [](Json& m) { m["files"]["plan.json"].erase("sha256"); });
  expect_bad("SHA-256", [](Json& m) { m["files"]["plan.json"]["sha256"] = std::string(64, 'a'); });
  expect_bad("hexadecimal", [](Json& m) { m["files"]["plan.json"]["sha256"] = std::string(64, 'A'); });
  expect_bad("has 2 bytes", [](Json& m) { m["files"]["plan.json"]["bytes"] = 3; });
  expect_bad("absent.txt",
             [](Json& m) { m["files"]["absent.txt"] = {{"bytes", 1}, {"sha256", std::string(64, '0')}}; });
  expect_bad("tokenizer", [](Json& m) { m["tokenizer"] = "tokenizer.hetc.json"; });
  expect_bad("plan.json", [](Json& m) { m["tokenizer"] = "plan.json"; });
  expect_bad("programs", [](Json& m) { m["programs"] = Json::array(); });
  expect_bad("programs", [](Json& m) { m["programs"][0]["file"] = "weights-00001.safetensors"; });
  expect_bad("Cannot load the program", [](Json& m) { m["programs"][0]["file"] = "plan.json"; });
}

TEST(BadArtifact, Truncated) {
  for (const char* name : {"manifest.json", "plan.json", "kernels/lib.so", "weights-00001.safetensors"}) {
    const FakeArtifact artifact;
    fs::resize_file(artifact.file(name), fs::file_size(artifact.file(name)) / 2);
    EXPECT_EQ(load(artifact), HETCOMP_BAD_ARTIFACT);
    EXPECT_NE(std::string(hetcomp_last_error()).find(name), std::string::npos) << hetcomp_last_error();
  }
  for (const char* name : {"manifest.json", "plan.json", "kernels/lib.so", "weights-00001.safetensors"}) {
    const FakeArtifact artifact;
    fs::remove(artifact.file(name));
    EXPECT_EQ(load(artifact),
              std::string(name) == "manifest.json" ? HETCOMP_NOT_FOUND : HETCOMP_BAD_ARTIFACT);
  }
}

TEST(BadArtifact, OneBitFlipped) {
  for (const char* name : {"plan.json", "kernels/lib.so", "weights-00001.safetensors"}) {
    for (const hetcomp_weights weights : {HETCOMP_WEIGHTS_MMAP, HETCOMP_WEIGHTS_RAM}) {
      const FakeArtifact artifact;
      std::string bytes = fake::read_file(artifact.file(name));
      bytes[bytes.size() - bytes.size() / 3 - 1] ^= 0x10;
      fake::write_file(artifact.file(name), bytes);
      hetcomp_load_options options;
      hetcomp_load_options_init(&options);
      options.weights = weights;
      EXPECT_EQ(load(artifact, &options), HETCOMP_BAD_ARTIFACT);
      EXPECT_NE(std::string(hetcomp_last_error()).find(name), std::string::npos) << hetcomp_last_error();
      options.verify_weights = 0;
      EXPECT_EQ(load(artifact, &options) == HETCOMP_OK, std::string(name).starts_with("weights"));
    }
  }
}

// Any damage of the manifest's text ends in a status, whatever it does to the numbers.
TEST(BadArtifact, ManifestFuzz) {
  const FakeArtifact artifact;
  const std::string good = fake::read_file(artifact.file("manifest.json"));
  std::mt19937 random(99);
  for (int round = 0; round < 3000; ++round) {
    std::string text = good;
    for (std::uint32_t n = 1 + random() % 4; n > 0; --n) {
      const std::size_t at = random() % text.size();
      switch (random() % 4) {
        case 0:
          text[at] = static_cast<char>(random());
          break;
        case 1:
          text.erase(at, random() % 20);
          break;
        case 2:
          text.insert(at, std::to_string(static_cast<std::int64_t>(random()) << (random() % 40)));
          break;
        default:
          text.insert(at, text.substr(random() % text.size(), random() % 40));
          break;
      }
      if (text.empty()) text = " ";
    }
    try {
      const Manifest manifest = Manifest::parse(text, "manifest.json");
      EXPECT_GE(manifest.model.vocab, 1);
      for (const WeightRecord& weight : manifest.weights) {
        const std::uint64_t size = manifest.files.at(weight.file).bytes;
        EXPECT_TRUE(weight.offset <= size && weight.bytes <= size - weight.offset);
      }
    } catch (const Error& error) {
      EXPECT_NE(std::string(error.what()).find("manifest.json"), std::string::npos);
    }
  }
  EXPECT_THROW(Manifest::parse(std::string(100000, '['), "manifest.json"), Error);
  EXPECT_THROW(Manifest::parse("", "manifest.json"), Error);
  EXPECT_THROW(Manifest::parse("[]", "manifest.json"), Error);
  EXPECT_THROW(Manifest::parse("null", "manifest.json"), Error);
}

std::string refusal(const Manifest& manifest, const std::vector<std::string>& available,
                    const std::string& forced) {
  try {
    choose_program(manifest, available, forced);
  } catch (const Error& error) {
    EXPECT_EQ(error.status(), HETCOMP_MISSING_ISA);
    return error.what();
  }
  return "accepted";
}

TEST(ChooseProgram, BestThatTheCpuHas) {
  Manifest manifest;
  manifest.programs = {{"avx512", "a"}, {"avx2", "b"}};
  EXPECT_EQ(choose_program(manifest, {"avx2", "avx512"}, "").file, "a");
  EXPECT_EQ(choose_program(manifest, {"avx2"}, "").file, "b");
  EXPECT_EQ(choose_program(manifest, {"avx2", "avx512"}, "avx2").file, "b");
  EXPECT_EQ(refusal(manifest, {"avx2"}, "avx512"),
            "This CPU has avx2, the artifact needs avx512: compile it with --isa avx2.");
  EXPECT_NE(refusal(manifest, {}, "").find("AVX2 or better"), std::string::npos);
  EXPECT_NE(refusal(manifest, {"avx2"}, "amx").find("no program for amx"), std::string::npos);
  manifest.programs = {{"avx512", "a"}};
  EXPECT_EQ(refusal(manifest, {"avx2"}, ""),
            "This CPU has avx2, the artifact needs avx512: compile it with --isa avx2.");
}

TEST(ChooseProgram, AnIsaThatNoCpuHasYet) {
  expect_refused(HETCOMP_MISSING_ISA, "the artifact needs avx4096",
                 [](Json& m) { m["programs"][0]["isa"] = "avx4096"; });
}

TEST(Load, ArgumentsAreChecked) {
  const FakeArtifact artifact;
  hetcomp_model* model = nullptr;
  hetcomp_load_options options;
  hetcomp_load_options_init(&options);
  EXPECT_EQ(hetcomp_load(nullptr, &options, &model), HETCOMP_INVALID_ARGUMENT);
  EXPECT_EQ(hetcomp_load(artifact.path().c_str(), &options, nullptr), HETCOMP_INVALID_ARGUMENT);
  EXPECT_EQ(hetcomp_load("/nonexistent", &options, &model), HETCOMP_NOT_FOUND);
  EXPECT_EQ(hetcomp_load(artifact.file("kernels").c_str(), &options, &model), HETCOMP_NOT_FOUND);
  EXPECT_EQ(hetcomp_load(artifact.file("plan.json").c_str(), &options, &model), HETCOMP_NOT_FOUND);
  options.threads = 100000;
  EXPECT_EQ(load(artifact, &options), HETCOMP_INVALID_ARGUMENT);
  options.threads = -1;
  EXPECT_EQ(load(artifact, &options), HETCOMP_INVALID_ARGUMENT);
  options.threads = 1;
  options.weights = 7;
  EXPECT_EQ(load(artifact, &options), HETCOMP_INVALID_ARGUMENT);
  options = {};
  EXPECT_EQ(load(artifact, &options), HETCOMP_INVALID_ARGUMENT);
  hetcomp_model_free(nullptr);
  hetcomp_session_free(nullptr);
  hetcomp_generation_free(nullptr);
}

}  // namespace
}  // namespace hetcomp
