// An artifact whose model a GPU and the CPU compute together, on the fake driver. All values are small whole
// numbers.
//   x[t] = embed[ids[t]] (GPU), y = 3 * x (CPU), state[slot][position] = y,
//   s[t] = sum over p <= position of (p % 5 + 1) * state[slot][p] (GPU), z = 2 * s + embed[0] (CPU),
//   logits[v] = z . head[v] (GPU)
// Or the GPU alone, without 3 *, 2 * and embed[0].
// As in a real model, what the CPU computes goes into the KV cache: a row that the CPU did not compute has
// there whatever its buffers hold.
#pragma once

#include <cstdint>
#include <nlohmann/json.hpp>
#include <string>
#include <vector>

#include "fake_artifact.h"
#include "fake_cuda.h"

namespace hetcomp::fake {

class FakeHybrid {
 public:
  enum class Parts { kGpuAndCpu, kGpu };
  // Of the shared cache sequences hold kSharedTokens positions together, each of 256 KB on the GPU, in blocks
  // of 4 and granules of 8; that of the GPU has kGranules of them.
  enum class Cache { kWhole, kShared };
  static constexpr std::int64_t kSharedTokens = 50;
  static constexpr int kGranules = 11;
  // Graphs: exactly 1 and 4 rows, these with candidates, and up to 7.
  explicit FakeHybrid(Parts parts = Parts::kGpuAndCpu, Cache cache = Cache::kWhole);
  ~FakeHybrid();
  FakeHybrid(const FakeHybrid&) = delete;
  FakeHybrid& operator=(const FakeHybrid&) = delete;

  const std::filesystem::path& path() const { return artifact_.path(); }
  const FakeArtifact& artifact() const { return artifact_; }
  nlohmann::json program() const;
  void write_program(const nlohmann::json& program) const;  // and its hash
  // From now on rows of logits whose candidates were found hold no numbers any more: nobody needs them.
  void spoil_sampled_logits() const;
  // Logits after the last of `ids`.
  std::vector<float> expected(const std::vector<std::int32_t>& ids) const;

 private:
  void write_gpu() const;
  nlohmann::json cache_buffer() const;
  nlohmann::json cpu_part(nlohmann::json manifest) const;

  Parts parts_;
  Cache cache_;
  FakeArtifact artifact_;
};

}  // namespace hetcomp::fake
