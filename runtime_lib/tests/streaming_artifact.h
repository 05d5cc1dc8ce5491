// The fake artifact with experts in the host's memory, which are streamed to the GPU in waves and perhaps
// cached.
#pragma once

#include <cstdint>
#include <functional>
#include <span>
#include <vector>

#include "fake_gpu.h"

namespace hetcomp::fake {

struct Streaming {
  int experts = 4;  // of each layer
  int slots = 8;
  int wave = 4;
  int waves = 1;
  double cpu_us = 1e6;  // what an expert takes on the CPU; a copy takes 0.256 us
  int cached = 0;       // slots of a cache
};

// Each layer's expert e is one number, value(layer, e). A graph of batch size 1 hands a layer's routing to
// the CPU, adds to the layer's sums by expert what the cache and then each wave has of it, and awaits the
// CPU. That of batch size 2 does the same without the waves.
class StreamingArtifact {
 public:
  static constexpr int kLayers = 3, kTopK = 2, kTokens = 20;

  explicit StreamingArtifact(const Streaming& streaming) { write(streaming); }
  void write(const Streaming& streaming);

  const FakeGpuArtifact& files() const { return artifact_; }
  gpu::HostWeights host_weights() const;
  std::unique_ptr<gpu::ProgramSet> load(const gpu::CudaDriver& driver, bool attach = true,
                                        const gpu::GpuOptions& options = {}) const;

  static float value(int layer, int expert) { return static_cast<float>(100 * (layer + 1) + expert + 1); }
  // By expert, of the last step.
  std::span<const float> sums(const gpu::ProgramSet& programs, int layer) const;

  // A step of kTokens tokens (or, decoding, of one) whose routing of each layer `routing` gives. `seen` looks
  // at what is left to the CPU.
  using Routing = std::function<std::vector<std::int32_t>(int layer)>;
  using Seen = std::function<void(int layer, std::span<const std::int32_t> ids, bool skip)>;
  void prompt(gpu::ProgramSet& programs, const Routing& routing, const Seen& seen) const {
    step(programs, 1, kTokens, routing, seen);
  }
  void decode(gpu::ProgramSet& programs, const Routing& routing, const Seen& seen) const {
    step(programs, 2, 1, routing, seen);
  }

 private:
  void step(gpu::ProgramSet& programs, std::int32_t batch, int tokens, const Routing& routing,
            const Seen& seen) const;

  FakeGpuArtifact artifact_{kLayers};
  nlohmann::json pristine_ = artifact_.read("program.json");
  std::vector<std::vector<float>> weights_;  // by layer
  int experts_ = 0;
};

}  // namespace hetcomp::fake
