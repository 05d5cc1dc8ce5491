// The fake driver, and an artifact's gpu/ for it in a temporary folder.
#pragma once

#include <filesystem>
#include <nlohmann/json.hpp>
#include <string>
#include <vector>

#include "fake_cuda.h"
#include "gpu/driver.h"
#include "gpu/program_set.h"

namespace hetcomp::fake {

// The control block of the fake driver, with a healthy machine.
FakeCuda& healthy_fake_cuda();
// See fake_cuda.h.
void set_foreign_kernels(FakeCudaModuleLoader loader, FakeCudaLauncher launcher);

// The inputs are x. Each of `layers` layers: out = x + 1 (GPU), in = 3 * out (CPU), x = in + shared, where
// shared = 2 * x - 1 is computed by the GPU beside the CPU. In the end y = x + weight. Batch size 2: only the
// end.
class FakeGpuArtifact {
 public:
  static constexpr std::size_t kWidth = 64;

  explicit FakeGpuArtifact(int layers = 3);
  ~FakeGpuArtifact();
  FakeGpuArtifact(const FakeGpuArtifact&) = delete;
  FakeGpuArtifact& operator=(const FakeGpuArtifact&) = delete;

  const std::filesystem::path& path() const { return path_; }
  static std::vector<gpu::ProgramFile> programs() { return {{"gpu:0", "gpu/program.json"}}; }
  nlohmann::json read(const std::string& name) const;  // of gpu/
  void write(const std::string& name, const nlohmann::json& json) const;

  // What the CPU computes for a layer: in = 3 * out.
  static void compute(const gpu::ProgramSet& program, int layer);
  // The whole CPU's part of a step.
  void answer_all(const gpu::ProgramSet& program, gpu::HandShake& hand_shake) const;
  // Runs a step on inputs first, first + 1, ... and tells whether y is right, exactly.
  bool step_is_right(gpu::ProgramSet& program, float first, std::int32_t batch = 1) const;

 private:
  int layers_;
  std::filesystem::path path_;
};

// An argument of a kernel in gpu/program.json: the address of a buffer.
inline nlohmann::json buffer(const std::string& name) { return {{"buffer", name}, {"offset", 0}}; }

// A file that the fake driver loads, with these kernels.
void write_cubin(const std::filesystem::path& file, const std::string& names);

}  // namespace hetcomp::fake
