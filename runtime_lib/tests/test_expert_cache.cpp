// Slots for experts on the fake driver, step by step: tables, contents, what is left to the CPU, faults.
// Meant to be run under ThreadSanitizer too.
#include <gtest/gtest.h>

#include <algorithm>
#include <array>
#include <cstring>

#include "fake_gpu.h"
#include "gpu/expert_cache.h"
#include "status.h"

namespace hetcomp::gpu {
namespace {

constexpr std::int32_t kExperts = 4, kSlots = 2, kHidden = 4;
constexpr std::size_t kLayers = 2, kBytes = 64, kRow = 16;
enum Buffer : std::size_t { kSlotBuffer, kTable, kIds, kSum };

GpuProgramRecord program_record() {
  GpuProgramRecord program{};
  program.device = "gpu:0";
  program.device_bytes = 1 << 16;
  program.flags = kLayers;
  program.buffers = {{"slots", (kLayers * kSlots + 1) * kBytes, BufferKind::kStream, {}, {}},
                     {"table", kLayers * kRow, BufferKind::kStream, {}, {}},
                     {"ids", 64, BufferKind::kPinnedOut, {}, {}},
                     {"sum", 256, BufferKind::kPinnedIn, {}, {}}};
  const TimeCurve curve({{1, 1.0}});
  program.stream = StreamRecord{1, 1, kLayers, kTable, kRow, 0, 0, {1.0, 2.0, curve, curve}, {}};
  program.expert_cache = ExpertCacheRecord{CacheRule::kLru, kSlots, kBytes, kTable, kRow, {}};
  for (std::size_t i = 0; i < kLayers; ++i) {
    const StreamOperand operand{kSlotBuffer, kBytes, {{i, {0, 1, 2, 3}}}};
    const auto number = static_cast<std::uint32_t>(i);
    program.stream->layers.push_back(
        {number, kExperts, 1, kHidden, kIds, 1, number, 1 + 2 * i, curve, {operand}});
    program.expert_cache->layers.push_back({{{kSlotBuffer, i * kSlots * kBytes}}, {0, 1}, kSum});
  }
  return program;
}

class ExpertCaches : public testing::Test {
 protected:
  ExpertCaches() {
    for (std::size_t i = 0; i < kLayers; ++i)
      for (std::size_t e = 0; e < kExperts; ++e)
        std::fill_n(host_[i].begin() + static_cast<std::ptrdiff_t>(e * kBytes), kBytes, value(i, e));
    cache_.fill(std::array<std::span<const std::uint8_t>, kLayers>{host_[0], host_[1]}, true);
  }
  ~ExpertCaches() override { driver_.stream_synchronize.raw(stream_.get()); }

  static std::uint8_t value(std::size_t layer, std::size_t expert) {
    return static_cast<std::uint8_t>(16 * layer + expert + 1);
  }
  template <class T>
  const T* device(Buffer buffer, std::uint64_t offset) const {
    return reinterpret_cast<const T*>(buffers_.address({buffer, offset}));
  }
  std::int32_t slot(std::size_t layer, std::size_t expert) const {
    return device<std::int32_t>(kTable, layer * kRow)[expert];
  }

  // What the GPU's table says is so: every slot that it names has the bytes of its expert.
  void expect_table_true() const {
    driver_.stream_synchronize(stream_.get());
    for (std::size_t i = 0; i < kLayers; ++i) {
      for (std::size_t e = 0; e < kExperts; ++e) {
        EXPECT_EQ(slot(i, e) >= 0, cache_.holds(i, static_cast<std::int32_t>(e)));
        if (slot(i, e) < 0) continue;
        const auto* bytes =
            device<std::uint8_t>(kSlotBuffer, (i * kSlots + static_cast<std::size_t>(slot(i, e))) * kBytes);
        EXPECT_EQ(std::count(bytes, bytes + kBytes, value(i, e)), kBytes);
      }
    }
  }

  // The CPU's part of layer `layer` in a step that has begun: whether anything is left to it.
  bool left_to_cpu(std::size_t layer, std::int32_t expert) {
    auto* const ids = reinterpret_cast<std::int32_t*>(shared_.host("ids").data());
    std::ranges::fill(shared_.host("sum"), std::byte{9});
    ids[0] = expert;
    const bool held = cache_.holds(layer, expert);
    const auto flag = static_cast<std::uint32_t>(layer);
    cache_.count(flag);
    cache_.leave_to_cpu(flag);
    EXPECT_EQ(ids[0], held ? -1 : expert);
    EXPECT_EQ(shared_.skip()[flag], held ? 1 : 0);
    const auto sum = shared_.host("sum");
    EXPECT_EQ(std::ranges::count(sum, std::byte{0}), held ? kHidden * 4 : 0);
    return !held;
  }

  // As GpuProgram does: when the GPU is at rest.
  void end_step() {
    driver_.stream_synchronize(stream_.get());
    cache_.end(true);
  }

  void step(std::int32_t first, std::int32_t second) {
    cache_.begin(1, true);
    expect_table_true();
    cache_.copy_next();  // as the CPU does before it waits
    left_to_cpu(0, first);
    left_to_cpu(1, second);
    end_step();
  }

  FakeCuda& fake_ = fake::healthy_fake_cuda();
  CudaDriver driver_{FAKE_CUDA};
  Device device_{driver_, 0};
  DeviceContext context_{driver_, device_.id};
  CurrentContext current_{driver_, context_};
  GpuProgramRecord program_ = program_record();
  DeviceBudget budget_{program_.device_bytes, "GPU 0"};
  StreamHandle stream_ = create_stream(driver_);
  SharedMemory shared_{driver_, context_, std::array<const GpuProgramRecord*, 1>{&program_},
                       std::chrono::milliseconds(1000), [] { return std::string(); }};
  ProgramBuffers buffers_{driver_, device_, ".", program_, shared_, budget_, stream_.get(), false};
  std::array<std::array<std::uint8_t, kExperts * kBytes>, kLayers> host_{};
  ExpertCopies copies_{driver_, context_};
  ExpertCache cache_{driver_, program_, buffers_, shared_, stream_.get(), copies_};
};

TEST_F(ExpertCaches, BeginsWithTheFirstExpertsAndSkipsWhatTheyServe) {
  cache_.begin(1, true);
  expect_table_true();
  EXPECT_FALSE(left_to_cpu(0, 1));
  EXPECT_TRUE(left_to_cpu(1, 3));
  end_step();
  EXPECT_EQ(cache_.statistics().hits, 1);
  EXPECT_EQ(cache_.statistics().misses, 1);
}

TEST_F(ExpertCaches, ANewcomerIsInTheTableOneStepAfterItsVictimHasLeft) {
  int without = 0;
  for (int i = 0; i < 60; ++i) {
    step(i < 30 ? 3 : 2, 0);
    int held = 0;
    for (std::int32_t e = 0; e < kExperts; ++e) held += slot(0, static_cast<std::size_t>(e)) >= 0 ? 1 : 0;
    without += held < kSlots ? 1 : 0;
  }
  EXPECT_TRUE(cache_.holds(0, 2) && cache_.holds(1, 0));
  EXPECT_EQ(cache_.statistics().swaps, 2);
  EXPECT_EQ(without, 2);
  EXPECT_EQ(cache_.statistics().bytes, 2 * static_cast<std::int64_t>(kBytes));
}

TEST_F(ExpertCaches, AnExpertThatCannotBeCopiedLeavesAnEmptySlot) {
  for (std::int64_t i = 0; i < CachePolicy::kLruMargin; ++i) step(3, 0);
  cache_.begin(1, true);
  EXPECT_FALSE(cache_.all_begun());
  fake_.fail_call = fake_.calls + 1;
  EXPECT_THROW(cache_.copy_next(), Error);
  driver_.stream_synchronize(stream_.get());
  fake_.fail_call = fake_.calls + 1;  // nor at the end of the step
  cache_.end(true);
  fake_.fail_call = 0;
  EXPECT_FALSE(cache_.holds(0, 3));
  EXPECT_EQ(cache_.statistics().swaps, 0);
  step(3, 0);
  step(3, 0);
  EXPECT_TRUE(cache_.holds(0, 3));
}

TEST_F(ExpertCaches, AStepThatIsGivenUpKeepsWhatHasCome) {
  for (std::int64_t i = 0; i < CachePolicy::kLruMargin; ++i) step(3, 0);
  cache_.begin(1, true);
  end_step();  // no layer was reached
  EXPECT_TRUE(cache_.holds(0, 3));
  step(3, 0);
}

// Expert 3 of layer 0 is used by every token of a prompt; its bytes stand in for what was streamed.
class ExpertsThatPass : public ExpertCaches {
 protected:
  static constexpr std::int64_t kTokens = 16;  // as many as the buffer of ids has room for

  std::vector<CacheArrival> prompt(const std::vector<std::int32_t>& streamed) {
    for (std::int64_t i = 0; i < CachePolicy::kLruMargin; ++i) step(0, 0);
    cache_.begin(kTokens, false);
    auto* const ids = reinterpret_cast<std::int32_t*>(shared_.host("ids").data());
    for (std::int64_t t = 0; t < kTokens; ++t) ids[t] = 3;
    cache_.count(0);
    return cache_.keep(0, streamed);
  }
  void take(const CacheArrival& arrival) {
    const CUdeviceptr from = buffers_.address({kSlotBuffer, kLayers * kSlots * kBytes});
    const auto expert = static_cast<std::size_t>(arrival.expert);
    copies_.copy(from, host_[arrival.layer].data() + expert * kBytes, kBytes);
    cache_.take(arrival, std::array{from});
    EXPECT_TRUE(copies_.finish());
  }
};

TEST_F(ExpertsThatPass, StayWhereTheyAreHotterFromTheNextStepOn) {
  const std::vector<CacheArrival> kept = prompt({2, 3});
  ASSERT_EQ(kept.size(), 1U);
  EXPECT_EQ(kept[0].expert, 3);
  EXPECT_TRUE(cache_.holds(0, 0) && cache_.holds(0, 1));  // until the step is over
  take(kept[0]);
  end_step();
  EXPECT_TRUE(cache_.holds(0, 0) && cache_.holds(0, 3) && !cache_.holds(0, 1));
  EXPECT_EQ(cache_.statistics().kept, 1);
  EXPECT_EQ(cache_.statistics().swaps, 0);
  EXPECT_EQ(cache_.statistics().bytes, 0);
  step(3, 0);
  EXPECT_EQ(cache_.statistics().misses, 0);
}

TEST_F(ExpertsThatPass, DoNotStayWhereTheStepIsGivenUpBeforeTheyAreThere) {
  prompt({3});
  end_step();
  EXPECT_FALSE(cache_.holds(0, 3) || cache_.holds(0, 1));
  EXPECT_EQ(cache_.statistics().kept, 0);
  step(0, 0);
  step(0, 0);  // the empty slot is filled as any other
  EXPECT_TRUE(cache_.holds(0, 3));
}

TEST_F(ExpertsThatPass, DoNotStayWhereACopyFailed) {
  take(prompt({3})[0]);
  cache_.end(false);
  EXPECT_FALSE(cache_.holds(0, 3) || cache_.holds(0, 1));
  step(0, 0);
}

TEST_F(ExpertCaches, PromptsCountAndChangeNothingUntilTheyAreOver) {
  const std::int64_t tokens = 16;  // as many as the buffer of ids has room for
  cache_.begin(tokens, false);
  std::fill_n(reinterpret_cast<std::int32_t*>(shared_.host("ids").data()), tokens, 3);
  cache_.count(0);
  cache_.leave_to_cpu(0);
  end_step();
  EXPECT_EQ(shared_.skip()[0], 0);
  EXPECT_EQ(cache_.statistics().hits + cache_.statistics().misses, 0);
  EXPECT_FALSE(cache_.holds(0, 3));
  step(0, 0);
  EXPECT_TRUE(cache_.holds(0, 3));
}

}  // namespace
}  // namespace hetcomp::gpu
