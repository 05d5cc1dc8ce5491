// An artifact around fake_program.cpp in a temporary folder, and what it must compute.
#pragma once

#include <cstdint>
#include <filesystem>
#include <nlohmann/json.hpp>
#include <string>
#include <vector>

namespace hetcomp::fake {

class FakeArtifact {
 public:
  static constexpr std::int64_t kContext = 40;
  static constexpr std::int32_t kMaxBatch = 3;
  static constexpr std::int32_t kEosId = 5;

  FakeArtifact();
  ~FakeArtifact();
  FakeArtifact(const FakeArtifact&) = delete;
  FakeArtifact& operator=(const FakeArtifact&) = delete;

  const std::filesystem::path& path() const { return path_; }
  std::filesystem::path file(const std::string& name) const { return path_ / name; }

  // manifest.json, to be changed and written.
  nlohmann::json manifest() const;
  void write_manifest(const nlohmann::json& manifest) const;

  // Logits after the last of `ids`.
  std::vector<float> expected(const std::vector<std::int32_t>& ids) const;
  // What the head is multiplied with, [kWidth].
  std::vector<float> sums(const std::vector<std::int32_t>& ids) const;
  // What greedy decoding must choose after them.
  std::int32_t expected_next(const std::vector<std::int32_t>& ids) const;

 private:
  std::filesystem::path path_;
  std::vector<float> embed_;
  std::vector<float> head_;
};

void write_file(const std::filesystem::path& path, const std::string& text);
std::string read_file(const std::filesystem::path& path);

}  // namespace hetcomp::fake
