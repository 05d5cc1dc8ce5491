// A KV cache that sequences share: its accounting, the CPU's memory, and whole models whose sequences hold
// fewer positions together than each may alone, on the CPU, on the fake GPU and on both.
#include <gtest/gtest.h>
#include <sys/mman.h>

#include <algorithm>
#include <numeric>
#include <optional>
#include <thread>

#include "cli/handles.h"
#include "fake_gpu.h"
#include "fake_hybrid.h"
#include "fake_program.h"
#include "hetcomp/hetcomp.h"
#include "kv_memory.h"
#include "kv_pool.h"
#include "status.h"

namespace hetcomp {
namespace {

using cli::check;
using cli::ModelPtr;
using cli::SessionPtr;
using fake::FakeArtifact;
using fake::FakeHybrid;
using Ids = std::vector<std::int32_t>;
using Logits = std::vector<float>;

std::string refusal(KvPool& pool, std::vector<KvPool::Claim> claims) {
  try {
    pool.claim(claims);
  } catch (const Error& error) {
    EXPECT_EQ(error.status(), HETCOMP_POOL_FULL);
    return error.what();
  }
  return {};
}

TEST(KvPool, AllOfAClaimOrNothing) {
  KvPool pool(3, 100);
  EXPECT_EQ(refusal(pool, {{0, 60}, {1, 30}}), "");
  EXPECT_EQ(
      refusal(pool, {{1, 35}, {2, 6}}),
      "The KV cache is full: 90 of its 100 positions are held by 2 sequences, and 11 more are needed: free, "
      "reset or truncate a session, or compile with a larger --kv-tokens.");
  EXPECT_EQ(pool.held(1), 30);
  EXPECT_EQ(pool.held(2), 0);
  EXPECT_EQ(refusal(pool, {{1, 35}, {2, 5}}), "");
  EXPECT_EQ(refusal(pool, {{0, 10}}), "");  // it holds more already
  EXPECT_EQ(pool.held(0), 60);
  pool.give_back(0, 70);
  EXPECT_NE(refusal(pool, {{2, 6}}), "");
  pool.give_back(0, 59);
  EXPECT_EQ(refusal(pool, {{2, 6}}), "");
  pool.give_back(1, 0);
  EXPECT_EQ(refusal(pool, {{2, 41}}), "");
}

// Two slots of 1,024 positions in runs of rows of 64 KB and 8 KB: 72 MB a slot.
Manifest two_runs(std::int64_t kv_tokens) {
  Manifest manifest;
  manifest.model.context = 1024;
  manifest.model.max_batch = 2;
  manifest.model.kv_tokens = kv_tokens;
  const std::vector<std::uint64_t> rows{1U << 16, 1U << 13};
  manifest.states.push_back({"kv", 1024 * (rows[0] + rows[1]), 2048 * (rows[0] + rows[1]), rows});
  return manifest;
}

void fill(const KvMemory& memory, std::int64_t slot, std::int64_t positions) {
  std::uint8_t* base = memory.addresses()[0] + slot * 1024 * ((1 << 16) + (1 << 13));
  std::fill_n(base, positions << 16, 1);
  std::fill_n(base + (1024 << 16), positions << 13, 1);
}

std::int64_t resident(const KvMemory& memory) {
  constexpr std::size_t kPages = 2 * 1024 * ((1 << 16) + (1 << 13)) / 4096;
  std::vector<unsigned char> pages(kPages);
  EXPECT_EQ(mincore(memory.addresses()[0], kPages * 4096, pages.data()), 0);
  return 4096 * std::ranges::count_if(pages, [](unsigned char page) { return (page & 1) != 0; });
}

Ids positions_to(std::int32_t end) {
  Ids positions(static_cast<std::size_t>(end));
  std::iota(positions.begin(), positions.end(), 0);
  return positions;
}

TEST(KvMemory, MuchIsGivenBackAtOnceAndLittleWhenOthersNeedIt) {
  KvMemory memory(two_runs(1024), kNoNode);
  KvPool pool(2, 1024);
  constexpr std::int64_t kPosition = (1 << 16) + (1 << 13);
  const auto write = [&](std::int32_t slot, std::int32_t end) {
    pool.claim(std::vector<KvPool::Claim>{{slot, end}});
    memory.write(Ids(static_cast<std::size_t>(end), slot), positions_to(end), pool);
    fill(memory, slot, end);
  };
  const auto keep = [&](std::int32_t slot, std::int64_t length) {
    pool.give_back(slot, length);
    memory.keep(slot, length);
  };
  write(0, 1000);
  EXPECT_EQ(resident(memory), 1000 * kPosition);
  keep(0, 10);  // 68 MB
  EXPECT_EQ(resident(memory), 10 * kPosition);
  EXPECT_EQ(memory.addresses()[0][10 * (1 << 16) - 1], 1);
  write(0, 600);
  keep(0, 300);  // 21 MB
  EXPECT_EQ(resident(memory), 600 * kPosition);
  write(1, 424);  // as many as the pool has
  EXPECT_EQ(resident(memory), 1024 * kPosition);
  write(1, 425);
  EXPECT_EQ(resident(memory), (300 + 425) * kPosition);
}

enum class Where { kCpu, kGpu, kBoth };

// Whole models of 50 positions for three sequences of at most 40.
class SharedCache : public testing::TestWithParam<Where> {
 protected:
  SharedCache() {
    if (GetParam() == Where::kCpu) {
      nlohmann::json manifest = cpu_.manifest();
      manifest["model"]["kv_tokens"] = FakeHybrid::kSharedTokens;
      manifest["states"][0]["rows"] = {fake::kWidth * 4};
      cpu_.write_manifest(manifest);
    } else {
      hybrid_.emplace(GetParam() == Where::kGpu ? FakeHybrid::Parts::kGpu : FakeHybrid::Parts::kGpuAndCpu,
                      FakeHybrid::Cache::kShared);
    }
    hetcomp_model* model = nullptr;
    check(hetcomp_load((hybrid_ ? hybrid_->path() : cpu_.path()).c_str(), nullptr, &model));
    model_.reset(model);
  }
  ~SharedCache() override {
    model_.reset();
    EXPECT_EQ(fake_.live(), 0);
    EXPECT_EQ(fake_.mapped, 0);
  }

  SessionPtr session() {
    hetcomp_session* session = nullptr;
    check(hetcomp_session_create(model_.get(), &session));
    return SessionPtr(session);
  }
  Logits expected(const Ids& ids) const { return hybrid_ ? hybrid_->expected(ids) : cpu_.expected(ids); }
  // Appends to a session of `before`, which must have the right result.
  void append(const SessionPtr& session, Ids before, const Ids& more) {
    Logits logits(fake::kVocab);
    ASSERT_EQ(
        hetcomp_prefill(session.get(), more.data(), static_cast<std::int64_t>(more.size()), logits.data()),
        HETCOMP_OK)
        << hetcomp_last_error();
    before.insert(before.end(), more.begin(), more.end());
    EXPECT_EQ(logits, expected(before));
  }
  void expect_full(const SessionPtr& session, std::int32_t tokens, const std::string& why) {
    Logits logits(fake::kVocab);
    const std::int64_t before = length(session);
    EXPECT_EQ(hetcomp_prefill(session.get(), range(tokens).data(), tokens, logits.data()), HETCOMP_POOL_FULL);
    EXPECT_NE(std::string(hetcomp_last_error()).find(why), std::string::npos) << hetcomp_last_error();
    EXPECT_EQ(length(session), before);
  }
  static std::int64_t length(const SessionPtr& session) {
    std::int64_t length = -1;
    check(hetcomp_session_length(session.get(), &length));
    return length;
  }
  static Ids range(std::int32_t n, std::int32_t first = 20) {
    Ids ids;
    for (std::int32_t i = 0; i < n; ++i) ids.push_back(20 + (first + i * 31) % 70);
    return ids;
  }

  FakeCuda& fake_ = fake::healthy_fake_cuda();
  const FakeArtifact cpu_;
  std::optional<FakeHybrid> hybrid_;
  ModelPtr model_;
};
INSTANTIATE_TEST_SUITE_P(Everywhere, SharedCache, testing::Values(Where::kCpu, Where::kGpu, Where::kBoth));

TEST_P(SharedCache, InfoSaysHowManyPositions) {
  hetcomp_model_info info;
  hetcomp_model_info_init(&info);
  check(hetcomp_model_get_info(model_.get(), &info));
  EXPECT_EQ(info.kv_tokens, 50);
  if (!hybrid_) return;
  EXPECT_EQ(fake_.granules, FakeHybrid::kGranules);
  EXPECT_EQ(fake_.mapped, 1);  // the block for rows of nobody
}

TEST_P(SharedCache, WhoNeedsMoreIsRefusedAndOthersGoOn) {
  const SessionPtr a = session();
  const SessionPtr b = session();
  append(a, {}, range(30));
  append(b, {}, range(15, 41));
  expect_full(b, 6, "45 of its 50 positions are held by 2 sequences, and 6 more are needed");
  append(b, range(15, 41), {33, 34});
  append(a, range(30), {35, 36, 37});
  expect_full(a, 1, "50 of its 50");
  // A prompt that the pool alone cannot take, although the context could.
  const SessionPtr c = session();
  expect_full(c, 20, "20 more are needed");
}

TEST_P(SharedCache, PositionsComeBackFromTruncateResetAndFree) {
  SessionPtr a = session();
  const SessionPtr b = session();
  append(a, {}, range(40));
  append(b, {}, range(10, 41));
  expect_full(b, 1, "50 of its 50");
  check(hetcomp_session_truncate(a.get(), 17));
  append(b, range(10, 41), range(23, 60));
  expect_full(a, 1, "50 of its 50");
  check(hetcomp_session_reset(b.get()));
  append(a, range(17), range(23, 77));  // full again
  append(b, {}, range(10));
  a.reset();
  append(b, range(10), range(30, 33));
  // What was kept of a session that was cut is what it was.
  const SessionPtr c = session();
  append(c, {}, range(10, 50));
}

TEST_P(SharedCache, ReuseKeepsThePrefixAndFreesTheRest) {
  const SessionPtr a = session();
  const SessionPtr b = session();
  append(a, {}, range(36));
  append(b, {}, range(14, 50));
  Ids next = range(20);
  next.push_back(88);
  std::int64_t kept = 0;
  check(hetcomp_session_reuse(a.get(), next.data(), 21, &kept));
  EXPECT_EQ(kept, 20);
  append(b, range(14, 50), range(15, 70));
  append(a, range(20), {88});
  expect_full(a, 1, "50 of its 50");
}

TEST_P(SharedCache, ADecodeStepTakesAllOrNothing) {
  const SessionPtr a = session();
  const SessionPtr b = session();
  append(a, {}, range(33));
  append(b, {}, range(16, 41));
  const std::vector<hetcomp_session*> both{a.get(), b.get()};
  const Ids ids{30, 31};
  Logits logits(2 * fake::kVocab);
  EXPECT_EQ(hetcomp_decode(model_.get(), both.data(), ids.data(), 2, logits.data()), HETCOMP_POOL_FULL);
  EXPECT_EQ(length(a), 33);
  EXPECT_EQ(length(b), 16);
  check(hetcomp_session_truncate(b.get(), 15));
  check(hetcomp_decode(model_.get(), both.data(), ids.data(), 2, logits.data()));
  Ids of_b = range(15, 41);
  of_b.push_back(31);
  EXPECT_EQ(Logits(logits.begin() + fake::kVocab, logits.end()), expected(of_b));
}

TEST_P(SharedCache, AGenerationClaimsItsPromptAndEndsWhenThereIsNoMore) {
  const SessionPtr a = session();
  const SessionPtr b = session();
  append(a, {}, range(30));
  hetcomp_generate_params params;
  hetcomp_generate_params_init(&params);
  params.ignore_eos = 1;
  params.max_new_tokens = 10;
  hetcomp_generation* raw = nullptr;
  const Ids prompt = range(18, 50);
  check(hetcomp_generation_start(b.get(), prompt.data(), 18, &params, &raw));
  const cli::GenerationPtr generation(raw);
  hetcomp_token token;
  check(hetcomp_generation_next(raw, &token));  // a part of the prompt
  EXPECT_LT(length(b), 18);
  expect_full(a, 3, "and 3 more are needed");
  check(hetcomp_generation_next(raw, &token));
  check(hetcomp_generation_next(raw, &token));
  EXPECT_EQ(length(b), 18);
  check(hetcomp_generation_next(raw, &token));
  check(hetcomp_generation_next(raw, &token));
  EXPECT_EQ(hetcomp_generation_next(raw, &token), HETCOMP_POOL_FULL);
  EXPECT_EQ(length(b), 20);
}

TEST_P(SharedCache, AStepThatFailsHoldsNothing) {
  if (GetParam() == Where::kGpu) return;  // its kernels do not fail
  const SessionPtr a = session();
  const SessionPtr b = session();
  append(a, {}, range(20));
  Ids bad = range(29);
  bad[28] = fake::kErrorId;
  EXPECT_EQ(hetcomp_prefill(b.get(), bad.data(), 29, nullptr), HETCOMP_COMPUTE);
  const auto kept = static_cast<std::int32_t>(length(b));
  EXPECT_EQ(kept, 28);
  append(a, range(20), {33, 34});
  expect_full(a, 1, "50 of its 50");
}

TEST_P(SharedCache, ManyRoundsOfSeveralThreads) {
  std::vector<std::jthread> threads;
  std::atomic<int> wrong{0};
  for (std::int32_t t = 0; t < FakeArtifact::kMaxBatch; ++t) {
    threads.emplace_back([&, t] {
      for (std::int32_t round = 0; round < 12; ++round) {
        const SessionPtr mine = session();
        const Ids ids = range(8 + (5 * round + 11 * t) % 30, 20 + t);
        Logits logits(fake::kVocab);
        const hetcomp_status status =
            hetcomp_prefill(mine.get(), ids.data(), static_cast<std::int64_t>(ids.size()), logits.data());
        if (status != HETCOMP_POOL_FULL) wrong += status != HETCOMP_OK || logits != expected(ids);
      }
    });
  }
  threads.clear();
  EXPECT_EQ(wrong, 0);
}

TEST(SmallCache, ASequenceEndsWhereThePoolDoes) {
  const FakeArtifact artifact;
  nlohmann::json manifest = artifact.manifest();
  manifest["model"]["kv_tokens"] = 30;
  artifact.write_manifest(manifest);
  hetcomp_model* model = nullptr;
  check(hetcomp_load(artifact.path().c_str(), nullptr, &model));
  const ModelPtr owner(model);
  hetcomp_session* created = nullptr;
  check(hetcomp_session_create(model, &created));
  const SessionPtr session(created);
  const Ids prompt(31, 20);
  EXPECT_EQ(hetcomp_prefill(created, prompt.data(), 31, nullptr), HETCOMP_CONTEXT_FULL);
  EXPECT_NE(
      std::string(hetcomp_last_error()).find("KV cache of 30 positions: shorten the input, or compile with"),
      std::string::npos)
      << hetcomp_last_error();
  hetcomp_generate_params params;
  hetcomp_generate_params_init(&params);
  params.ignore_eos = 1;
  std::int32_t finish = -1;
  check(hetcomp_generate(created, prompt.data(), 28, &params, nullptr, nullptr, &finish));
  EXPECT_EQ(finish, HETCOMP_FINISH_CONTEXT);
}

class SharedCacheOnTheGpu : public testing::Test {
 protected:
  ~SharedCacheOnTheGpu() override { EXPECT_EQ(fake_.live(), 0); }
  std::string refusal() const {
    hetcomp_model* model = nullptr;
    EXPECT_NE(hetcomp_load(artifact_.path().c_str(), nullptr, &model), HETCOMP_OK);
    return hetcomp_last_error();
  }

  FakeCuda& fake_ = fake::healthy_fake_cuda();
  const FakeHybrid artifact_{FakeHybrid::Parts::kGpu, FakeHybrid::Cache::kShared};
};

TEST_F(SharedCacheOnTheGpu, MapsNothingWhileTheCacheDoesNotGrow) {
  hetcomp_model* raw = nullptr;
  check(hetcomp_load(artifact_.path().c_str(), nullptr, &raw));
  const ModelPtr model(raw);
  hetcomp_session* created = nullptr;
  check(hetcomp_session_create(raw, &created));
  const SessionPtr session(created);
  const Ids ids(9, 30);  // 9 positions of 8 a granule
  check(hetcomp_prefill(created, ids.data(), 9, nullptr));
  EXPECT_EQ(fake_.mapped, 3);
  const int mappings = fake_.mappings;
  for (int i = 0; i < 7; ++i) check(hetcomp_prefill(created, ids.data(), 1, nullptr));
  check(hetcomp_session_truncate(created, 3));  // what is mapped stays, until others need it
  check(hetcomp_prefill(created, ids.data(), 5, nullptr));
  EXPECT_EQ(fake_.mappings, mappings);
}

TEST_F(SharedCacheOnTheGpu, FailuresOfTheDriverLeaveNothingBehind) {
  fake_.memory_mapping = false;
  EXPECT_NE(refusal().find("cannot map memory in pieces of 2.1 MB"), std::string::npos) << refusal();
  fake_.memory_mapping = true;
  fake_.calls = 0;
  hetcomp_model* model = nullptr;
  check(hetcomp_load(artifact_.path().c_str(), nullptr, &model));
  hetcomp_model_free(model);
  const int calls = fake_.calls;
  fake_.fail_result = CUDA_ERROR_OUT_OF_MEMORY;
  int of_the_cache = 0;
  for (int call = 1; call <= calls; ++call) {
    fake_.calls = 0;
    fake_.fail_call = call;
    of_the_cache += refusal().find("smaller --kv-tokens") != std::string::npos ? 1 : 0;
    EXPECT_EQ(fake_.live(), 0) << call;
  }
  EXPECT_EQ(of_the_cache, FakeHybrid::kGranules);
  fake_.fail_call = 0;
}

TEST_F(SharedCacheOnTheGpu, AMappingThatFailsIsAFailedStep) {
  hetcomp_model* raw = nullptr;
  check(hetcomp_load(artifact_.path().c_str(), nullptr, &raw));
  const ModelPtr model(raw);
  hetcomp_session* created = nullptr;
  check(hetcomp_session_create(raw, &created));
  const SessionPtr session(created);
  const Ids ids = {30, 31, 32, 33, 34, 35};
  Logits logits(fake::kVocab);
  check(hetcomp_prefill(created, ids.data(), 6, logits.data()));
  for (const int call : {1, 2}) {  // the mapping, and the access
    fake_.calls = 0;
    fake_.fail_call = call;
    EXPECT_EQ(hetcomp_prefill(created, ids.data(), 6, logits.data()), HETCOMP_COMPUTE);
    fake_.fail_call = 0;
    EXPECT_EQ(fake_.mapped, 2);
  }
  check(hetcomp_prefill(created, ids.data(), 6, logits.data()));
  Ids all = ids;
  all.insert(all.end(), ids.begin(), ids.end());
  EXPECT_EQ(logits, artifact_.expected(all));
}

TEST_F(SharedCacheOnTheGpu, APlanThatDoesNotFitTheManifest) {
  nlohmann::json program = artifact_.program();
  for (nlohmann::json& buffer : program["buffers"])
    if (buffer["name"] == "kv") buffer["cache"]["slots"] = 2;
  program["device_bytes"] = 64 << 20;
  artifact_.write_program(program);
  EXPECT_NE(refusal().find("a KV cache of 2 sequences"), std::string::npos) << refusal();
  for (nlohmann::json& buffer : program["buffers"])
    if (buffer["name"] == "kv") buffer.erase("cache");
  artifact_.write_program(program);
  EXPECT_NE(refusal().find("the state kv without a place for rows of nobody"), std::string::npos)
      << refusal();
}

}  // namespace
}  // namespace hetcomp
