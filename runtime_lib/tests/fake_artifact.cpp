#include "fake_artifact.h"

#include <stdlib.h>
#include <xxhash.h>

#include <algorithm>
#include <array>
#include <cstdio>
#include <fstream>
#include <random>
#include <stdexcept>

#include "fake_program.h"
#include "file.h"

namespace hetcomp::fake {
namespace {

namespace fs = std::filesystem;

std::vector<float> small_numbers(std::int64_t n, std::uint32_t seed) {
  std::mt19937 random(seed);
  std::vector<float> values(static_cast<std::size_t>(n));
  for (float& value : values) value = static_cast<float>(static_cast<int>(random() % 7) - 3);
  return values;
}

nlohmann::json weight(const std::string& name, std::size_t offset, const std::vector<float>& values) {
  const std::size_t bytes = values.size() * sizeof(float);
  std::array<char, 17> hash{};
  std::snprintf(hash.data(), hash.size(), "%016llx",
                static_cast<unsigned long long>(XXH3_64bits(values.data(), bytes)));
  return {{"name", name},
          {"file", "weights-00001.safetensors"},
          {"offset", offset},
          {"bytes", bytes},
          {"xxh3_64", hash.data()}};
}

}  // namespace

void write_file(const fs::path& path, const std::string& text) {
  std::ofstream(path, std::ios::binary) << text;
}

std::string read_file(const fs::path& path) { return File(path).text(); }

FakeArtifact::FakeArtifact()
    : embed_(small_numbers(kVocab * kWidth, 1)), head_(small_numbers(kVocab * kWidth, 2)) {
  std::string name = (fs::temp_directory_path() / "hetcomp-XXXXXX").string();
  if (mkdtemp(name.data()) == nullptr) throw std::runtime_error("no temporary folder");
  path_ = name;
  fs::create_directory(path_ / "kernels");
  fs::copy_file(FAKE_PROGRAM, path_ / "kernels" / "lib.so");
  write_file(path_ / "plan.json", kPlan);

  // The weights at 64 and at the next multiple of 64 after the first.
  const std::size_t bytes = embed_.size() * sizeof(float);
  const std::size_t second = (64 + bytes + 63) / 64 * 64;
  std::string weights(second + bytes, '\0');
  std::copy_n(reinterpret_cast<const char*>(embed_.data()), bytes, weights.begin() + 64);
  std::copy_n(reinterpret_cast<const char*>(head_.data()), bytes,
              weights.begin() + static_cast<long>(second));
  write_file(path_ / "weights-00001.safetensors", weights);

  nlohmann::json files;
  for (const char* file : {"plan.json", "kernels/lib.so"})
    files[file] = {{"bytes", fs::file_size(path_ / file)}, {"sha256", File(path_ / file).sha256()}};
  files["weights-00001.safetensors"] = {{"bytes", weights.size()}};
  write_manifest({
      {"schema", {1, 0}},
      {"hetcomp", "0.1.0"},
      {"model",
       {{"name", "fake"},
        {"architecture", "Fake"},
        {"vocab", kVocab},
        {"context", kContext},
        {"max_batch", kMaxBatch},
        {"max_tokens", kMaxTokens},
        {"max_logit_rows", kMaxLogitRows},
        {"eos_token_ids", {kEosId}},
        {"bos_token_id", nullptr}}},
      {"files", files},
      {"programs", {{{"isa", FAKE_ISA}, {"file", "kernels/lib.so"}}}},
      {"weights", {weight("embed", 64, embed_), weight("head", second, head_)}},
      {"states", {{{"name", "kv"}, {"bytes_per_slot", kContext * kWidth * 4}}}},
      {"timers", {"append"}},
      {"tokenizer", nullptr},
      {"chat_template", nullptr},
  });
}

FakeArtifact::~FakeArtifact() {
  std::error_code ignored;
  fs::remove_all(path_, ignored);
}

nlohmann::json FakeArtifact::manifest() const {
  return nlohmann::json::parse(read_file(path_ / "manifest.json"));
}

void FakeArtifact::write_manifest(const nlohmann::json& manifest) const {
  write_file(path_ / "manifest.json", manifest.dump(1));
}

std::vector<float> FakeArtifact::sums(const std::vector<std::int32_t>& ids) const {
  std::vector<float> sums(kWidth);
  for (std::size_t p = 0; p < ids.size(); ++p)
    for (std::size_t d = 0; d < kWidth; ++d)
      sums[d] += static_cast<float>(p % 5 + 1) * embed_[static_cast<std::size_t>(ids[p]) * kWidth + d];
  return sums;
}

std::vector<float> FakeArtifact::expected(const std::vector<std::int32_t>& ids) const {
  const std::vector<float> x = sums(ids);
  std::vector<float> logits(kVocab);
  for (std::size_t v = 0; v < logits.size(); ++v)
    for (std::size_t d = 0; d < kWidth; ++d) logits[v] += x[d] * head_[v * kWidth + d];
  return logits;
}

std::int32_t FakeArtifact::expected_next(const std::vector<std::int32_t>& ids) const {
  const std::vector<float> logits = expected(ids);
  return static_cast<std::int32_t>(std::ranges::max_element(logits) - logits.begin());
}

}  // namespace hetcomp::fake
