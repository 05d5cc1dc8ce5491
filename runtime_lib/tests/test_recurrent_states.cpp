// Copies of the states of recurrences on a GPU.
#include <gtest/gtest.h>

#include <numeric>

#include "fake_gpu.h"

namespace hetcomp::gpu {
namespace {

constexpr std::int32_t kSlots = 3;

std::vector<std::byte> counted(std::size_t bytes, int first) {
  std::vector<std::byte> made(bytes);
  for (std::size_t i = 0; i < bytes; ++i) made[i] = static_cast<std::byte>(first + static_cast<int>(i));
  return made;
}

TEST(RecurrentStates, AreCopiedAndPutBackBySlot) {
  fake::healthy_fake_cuda();
  const fake::FakeGpuArtifact artifact;
  nlohmann::json program = artifact.read("program.json");
  const nlohmann::json states{{{"offset", 0}, {"slot_bytes", 32}}, {{"offset", 256}, {"slot_bytes", 64}}};
  program["buffers"].push_back({{"name", "recurrent"},
                                {"bytes", 512},
                                {"kind", "recurrent"},
                                {"recurrent", {{"slots", kSlots}, {"states", states}}}});
  artifact.write("program.json", program);
  const CudaDriver driver;
  const ProgramSet programs(driver, artifact.path(), fake::FakeGpuArtifact::programs(), {});
  const GpuProgram& gpu = programs[0];
  ASSERT_EQ(gpu.recurrent_bytes(), 96U);
  for (std::int32_t slot = 0; slot < kSlots; ++slot) gpu.restore_recurrent(slot, counted(96, 90 * slot));
  for (std::int32_t slot = 0; slot < kSlots; ++slot) {
    std::vector<std::byte> saved(96);
    gpu.save_recurrent(slot, saved);
    EXPECT_EQ(saved, counted(96, 90 * slot)) << slot;
  }
}

TEST(RecurrentStates, ThereAreNoneWithoutRecurrences) {
  fake::healthy_fake_cuda();
  const fake::FakeGpuArtifact artifact;
  const CudaDriver driver;
  const ProgramSet programs(driver, artifact.path(), fake::FakeGpuArtifact::programs(), {});
  EXPECT_EQ(programs[0].recurrent_bytes(), 0U);
}

}  // namespace
}  // namespace hetcomp::gpu
