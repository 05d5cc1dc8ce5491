// Weights that an artifact refers to in other files: made as they were, and refused where a file or the
// manifest is not what it was. That all encodings give the compiler's bytes is tested from Python
// (tests/unit/test_external_weights.py).
#include <gtest/gtest.h>
#include <sys/stat.h>
#include <xxhash.h>

#include <array>
#include <chrono>
#include <cstdio>
#include <filesystem>
#include <functional>
#include <random>

#include "fake_artifact.h"
#include "fake_program.h"
#include "hetcomp/hetcomp.h"
#include "manifest.h"
#include "status.h"

namespace hetcomp {
namespace {

namespace fs = std::filesystem;
using fake::FakeArtifact;

constexpr std::int64_t kNumbers = fake::kVocab * fake::kWidth;
constexpr std::int64_t kBytes = (kNumbers * 4 + 63) / 64 * 64;

// The fake artifact whose first weight is in a file of another folder, two bytes behind a multiple of 4.
class Referring {
 public:
  Referring() {
    const std::string weights = fake::read_file(artifact_.file("weights-00001.safetensors"));
    std::string numbers = weights.substr(64, kNumbers * 4);
    fake::write_file(source(), std::string(66, 'x') + numbers);
    numbers.resize(kBytes, '\0');
    std::array<char, 17> hash{};
    std::snprintf(hash.data(), hash.size(), "%016llx",
                  static_cast<unsigned long long>(XXH3_64bits(numbers.data(), numbers.size())));
    struct stat info{};
    stat(source().c_str(), &info);
    nlohmann::json manifest = artifact_.manifest();
    manifest["sources"] = {{{"path", source().string()},
                            {"bytes", fs::file_size(source())},
                            {"mtime_ns", info.st_mtim.tv_sec * 1'000'000'000 + info.st_mtim.tv_nsec}}};
    manifest["weights"][0] = {{"name", "embed"}, {"bytes", kBytes}, {"xxh3_64", hash.data()}};
    manifest["weights"][0]["stored"] = {{"format", "f32"},  {"layout", "row_major"},
                                        {"numbers", "F32"}, {"rows", kNumbers},
                                        {"columns", 1},     {"matrices", {{{0, 66, kNumbers, 4}}}}};
    artifact_.write_manifest(manifest);
  }

  fs::path source() const { return outside_.file("model.gguf"); }
  const FakeArtifact& artifact() const { return artifact_; }

  // Loads it; verify: whether hashes are compared. Its own message is in hetcomp_last_error().
  hetcomp_status load(hetcomp_weights weights = HETCOMP_WEIGHTS_RAM, bool verify = true) const {
    hetcomp_load_options options;
    hetcomp_load_options_init(&options);
    options.weights = weights;
    options.verify_weights = verify;
    hetcomp_model* model = nullptr;
    const hetcomp_status status = hetcomp_load(artifact_.path().c_str(), &options, &model);
    hetcomp_model_free(model);
    return status;
  }

  // The sentence of a load that must be refused so.
  std::string refusal(hetcomp_status expected, bool verify = true) const {
    EXPECT_EQ(load(HETCOMP_WEIGHTS_RAM, verify), expected) << hetcomp_last_error();
    return hetcomp_last_error();
  }

 private:
  FakeArtifact artifact_;
  FakeArtifact outside_;
};

void set_time_back(const fs::path& path) {
  fs::last_write_time(path, fs::last_write_time(path) - std::chrono::hours(1));
}

bool says(const std::string& sentence, const std::string& word) {
  return sentence.find(word) != std::string::npos;
}

TEST(StoredWeight, IsMadeOfTheOtherFile) {
  const Referring referring;
  for (const hetcomp_weights weights : {HETCOMP_WEIGHTS_RAM, HETCOMP_WEIGHTS_MMAP})
    EXPECT_EQ(referring.load(weights), HETCOMP_OK) << hetcomp_last_error();
}

TEST(StoredWeight, AFileThatIsNotThereOrOfAnotherSizeIsRefused) {
  const Referring referring;
  const std::string path = referring.source().string();
  fs::resize_file(path, fs::file_size(path) - 1);
  std::string sentence = referring.refusal(HETCOMP_BAD_ARTIFACT);
  EXPECT_TRUE(says(sentence, path + " has 3169 bytes, and had 3170 when the model was compiled")) << sentence;
  fs::remove(path);
  sentence = referring.refusal(HETCOMP_NOT_FOUND);
  EXPECT_TRUE(says(sentence, path + ", which cannot be read (No such file or directory); put the file back"))
      << sentence;
  fs::create_directory(path);
  EXPECT_TRUE(says(referring.refusal(HETCOMP_BAD_ARTIFACT), "is not a regular file"));
  fs::remove(path);
  ASSERT_EQ(mkfifo(path.c_str(), 0600), 0);  // opening it would wait for a writer
  EXPECT_TRUE(says(referring.refusal(HETCOMP_BAD_ARTIFACT), "is not a regular file"));
}

TEST(StoredWeight, AFileThatWasTouchedIsLookedAtInAnyCase) {
  const Referring referring;
  set_time_back(referring.source());
  EXPECT_EQ(referring.load(HETCOMP_WEIGHTS_RAM, false), HETCOMP_OK) << hetcomp_last_error();
  std::string bytes = fake::read_file(referring.source());
  bytes[1000] ^= 1;
  fake::write_file(referring.source(), bytes);
  for (const bool verify : {false, true}) {
    const std::string sentence = referring.refusal(HETCOMP_BAD_ARTIFACT, verify);
    EXPECT_TRUE(says(sentence, "The weight embed in " + referring.source().string() + " is not what it was"))
        << sentence;
  }
}

// The refusal after a change of the manifest.
void refused_manifest(const std::string& word, const std::function<void(nlohmann::json&)>& change) {
  const Referring referring;
  nlohmann::json manifest = referring.artifact().manifest();
  change(manifest);
  referring.artifact().write_manifest(manifest);
  const std::string sentence = referring.refusal(HETCOMP_BAD_ARTIFACT);
  EXPECT_TRUE(says(sentence, word)) << "'" << word << "' is not in: " << sentence;
}

void refused_run(const nlohmann::json& run, const std::string& word = "stored.matrices[0][0]") {
  refused_manifest(word, [&](nlohmann::json& m) { m["weights"][0]["stored"]["matrices"][0][0] = run; });
}

TEST(StoredWeight, RunsOutsideTheirFile) {
  refused_run({1, 66, kNumbers, 4});
  refused_run({0, 70, kNumbers, 4}, "inside ");
  refused_run({0, 1ULL << 63, kNumbers, 4});
  refused_run({0, 66, kNumbers, 5}, "inside ");
  refused_run({0, 66, kNumbers, ~0ULL});
  refused_run({0, 66, kNumbers, 1ULL << 62});
  refused_run({0, 66, kNumbers + 1, 0}, "rows");
  refused_run({0, 66, kNumbers - 1, 4}, "runs of 776 rows");
  refused_run({0, 66, 0, 4});
  refused_run({0, 66, 1ULL << 40, 0});
  refused_run({0, 66, -1, 4});
  refused_run({0, 66, kNumbers});
  refused_manifest("stored.line", [](nlohmann::json& m) { m["weights"][0]["stored"]["line"] = 1ULL << 60; });
  refused_manifest("stored.line", [](nlohmann::json& m) { m["weights"][0]["stored"]["line"] = 3; });
  refused_run("run");
}

TEST(StoredWeight, DescriptionsThatDoNotFit) {
  const auto bad = [](const std::string& word, const std::string& key, const nlohmann::json& value) {
    refused_manifest(word, [&](nlohmann::json& m) { m["weights"][0]["stored"][key] = value; });
  };
  bad("stored.format", "format", "q5");
  bad("rows of one f32 number", "format", "bf16");
  bad("stored.layout", "layout", "panels");
  bad("stored.numbers", "numbers", "Q2_K");
  bad("stored.scales", "numbers", "int8");
  bad("stored.numbers", "numbers", "F64");
  bad("whole blocks of 32", "numbers", "Q8_0");
  bad("stored.rows", "rows", 0);
  bad("rest of 1 rows", "rows", 1);
  bad("stored.rows", "rows", 1ULL << 40);
  bad("rows of one f32 number", "columns", 2);
  bad("stored.matrices", "matrices", nlohmann::json::array());
  bad("stored.matrices", "matrices", {{"a", 1}});
  refused_manifest("3136 bytes", [](nlohmann::json& m) {
    m["weights"][0]["stored"]["layout"] = "panels16";  // of which one number a row takes 16
    m["weights"][0]["bytes"] = 3136;
    m["weights"][0]["stored"]["columns"] = 2;
    m["weights"][0]["stored"]["matrices"] = {{{0, 66, 388, 8}, {0, 66, 388, 0}}};
  });
  refused_manifest("such rows go into", [](nlohmann::json& m) {
    m["weights"][0]["stored"].update(
        {{"numbers", "Q8_0"}, {"columns", 32}, {"layout", "panels16"}, {"format", "q4"}});
  });
  refused_manifest("weights[0].bytes", [](nlohmann::json& m) { m["weights"][0]["bytes"] = 1ULL << 50; });
  refused_manifest("a weight of 3200 bytes", [](nlohmann::json& m) { m["weights"][0]["bytes"] = 3200; });
  refused_manifest("weights[0].file",
                   [](nlohmann::json& m) { m["weights"][0]["file"] = "weights-00001.safetensors"; });
  refused_manifest("on_demand", [](nlohmann::json& m) { m["weights"][0]["on_demand"] = true; });
}

TEST(StoredWeight, SourcesThatAreNone) {
  refused_manifest("absolute path", [](nlohmann::json& m) { m["sources"][0]["path"] = "model.gguf"; });
  refused_manifest("absolute path",
                   [](nlohmann::json& m) { m["sources"][0]["path"] = std::string("/a\0b", 4); });
  refused_manifest("absolute path", [](nlohmann::json& m) { m["sources"][0]["path"] = ""; });
  refused_manifest("sources[0].bytes", [](nlohmann::json& m) { m["sources"][0]["bytes"] = 0; });
  refused_manifest("sources[0].mtime_ns", [](nlohmann::json& m) { m["sources"][0]["mtime_ns"] = "now"; });
  refused_manifest("no sources", [](nlohmann::json& m) { m.erase("sources"); });
  refused_manifest("sources", [](nlohmann::json& m) { m["sources"] = 7; });
}

// Any damage of the text ends in a status, and what passes stays inside its files.
TEST(StoredWeight, ManifestFuzz) {
  const Referring referring;
  const std::string good = fake::read_file(referring.artifact().file("manifest.json"));
  std::mt19937 random(5);
  for (int round = 0; round < 2000; ++round) {
    std::string text = good;
    for (std::uint32_t n = 1 + random() % 3; n > 0; --n) {
      const std::size_t at = random() % text.size();
      if (random() % 2 == 0)
        text[at] = static_cast<char>('0' + random() % 10);
      else
        text.insert(at, std::to_string(random()));
    }
    try {
      const Manifest manifest = Manifest::parse(text, "manifest.json");
      for (const WeightRecord& weight : manifest.weights) {
        if (!weight.stored) continue;
        for (const RowRun& run : weight.stored->matrices.front()) {
          const std::uint64_t size = manifest.sources.at(run.source).bytes;
          EXPECT_LE(run.offset, size);
          EXPECT_LE((run.count - 1) * run.stride, size - run.offset);
        }
      }
    } catch (const Error& error) {
      EXPECT_TRUE(says(error.what(), "manifest.json"));
    }
  }
}

}  // namespace
}  // namespace hetcomp
