// Models that a GPU and the CPU compute together, or a GPU alone: whole artifacts through the C ABI, on the
// fake driver.
#include <gtest/gtest.h>

#include <algorithm>
#include <chrono>
#include <memory>
#include <thread>

#include "cli/handles.h"
#include "fake_gpu.h"
#include "fake_hybrid.h"
#include "fake_program.h"
#include "hetcomp/hetcomp.h"
#include "sampler.h"
#include "session.h"
#include "status.h"

namespace hetcomp {
namespace {

using cli::check;
using cli::ModelPtr;
using cli::SessionPtr;
using fake::FakeArtifact;
using fake::FakeHybrid;
using Ids = std::vector<std::int32_t>;
using Json = nlohmann::json;
using Logits = std::vector<float>;

ModelPtr load(const FakeHybrid& artifact) {
  hetcomp_model* model = nullptr;
  check(hetcomp_load(artifact.path().c_str(), nullptr, &model));
  return ModelPtr(model);
}

// A session and the tokens that it should have.
struct Sequence {
  explicit Sequence(hetcomp_model* model) {
    hetcomp_session* created = nullptr;
    check(hetcomp_session_create(model, &created));
    session.reset(created);
  }
  Logits prefill(const Ids& more) {
    Logits logits(fake::kVocab);
    check(hetcomp_prefill(session.get(), more.data(), static_cast<std::int64_t>(more.size()), logits.data()));
    ids.insert(ids.end(), more.begin(), more.end());
    return logits;
  }
  std::int64_t length() const {
    std::int64_t length = -1;
    check(hetcomp_session_length(session.get(), &length));
    return length;
  }

  SessionPtr session;
  Ids ids;
};

Ids range(std::int32_t n, std::int32_t first = 20) {
  Ids ids;
  for (std::int32_t i = 0; i < n; ++i) ids.push_back(20 + (first + i * 31) % 70);
  return ids;
}

// One token for each; what came of it must be `expected` of the sequence.
void expect_decode(hetcomp_model* model, const FakeHybrid& artifact, const std::vector<Sequence*>& sequences,
                   const Ids& ids) {
  std::vector<hetcomp_session*> sessions;
  for (Sequence* sequence : sequences) sessions.push_back(sequence->session.get());
  Logits logits(ids.size() * fake::kVocab);
  check(hetcomp_decode(model, sessions.data(), ids.data(), static_cast<std::int64_t>(ids.size()),
                       logits.data()));
  for (std::size_t i = 0; i < ids.size(); ++i) {
    sequences[i]->ids.push_back(ids[i]);
    const auto row = logits.begin() + static_cast<long>(i * fake::kVocab);
    EXPECT_EQ(Logits(row, row + fake::kVocab), artifact.expected(sequences[i]->ids)) << "row " << i;
  }
}

Json statistics(const hetcomp_model* model) {
  char* text = nullptr;
  check(hetcomp_model_stats(model, &text));
  const cli::Buffer<char> owner(text);
  return Json::parse(text);
}

class HybridModels : public testing::Test {
 protected:
  ~HybridModels() override { EXPECT_EQ(fake_.live(), 0); }

  FakeCuda& fake_ = fake::healthy_fake_cuda();
};
class GpuModels : public HybridModels, public testing::WithParamInterface<FakeHybrid::Parts> {};
INSTANTIATE_TEST_SUITE_P(Parts, GpuModels,
                         testing::Values(FakeHybrid::Parts::kGpuAndCpu, FakeHybrid::Parts::kGpu));

std::vector<std::int32_t> generate(Sequence& sequence, const Ids& prompt, const SamplingParams& sampling,
                                   std::uint64_t seed = 0) {
  hetcomp_generate_params params;
  hetcomp_generate_params_init(&params);
  params.max_new_tokens = 4;
  params.temperature = sampling.temperature;
  params.top_k = sampling.top_k;
  params.top_p = sampling.top_p;
  params.min_p = sampling.min_p;
  params.repetition_penalty = sampling.repetition_penalty;
  params.seed = seed;
  params.ignore_eos = 1;
  std::vector<std::int32_t> ids;
  const auto keep = [](const hetcomp_token* token, void* to) {
    static_cast<std::vector<std::int32_t>*>(to)->push_back(token->id);
    return 0;
  };
  check(hetcomp_generate(sequence.session.get(), prompt.data(), static_cast<std::int64_t>(prompt.size()),
                         &params, keep, &ids, nullptr));
  return ids;
}

TEST_P(GpuModels, GreedyTokensAreTheGpusAndThoseOfTheLogits) {
  const FakeHybrid artifact(GetParam());
  const ModelPtr model = load(artifact);
  Ids ids = range(6);
  Sequence greedy(model.get());
  const std::vector<std::int32_t> found = generate(greedy, ids, {});
  ASSERT_EQ(found.size(), 4U);
  for (const std::int32_t id : found) {
    const Logits logits = artifact.expected(ids);
    EXPECT_EQ(id, std::ranges::max_element(logits) - logits.begin());
    ids.push_back(id);
  }
  // At next to no temperature the same tokens are drawn, from the logits on the host.
  greedy.session.reset();
  Sequence drawn(model.get());
  EXPECT_EQ(generate(drawn, range(6), {.temperature = 1e-6}), found);
}

// The tokens of a sampler that has all logits: where the candidates tell (spoil: the logits are not there)
// and where they do not. The first token follows a prompt, whose graph finds none.
TEST_P(GpuModels, SampledTokensAreThoseOfTheLogits) {
  const FakeHybrid artifact(GetParam());
  const ModelPtr model = load(artifact);
  struct Case {
    SamplingParams params;
    bool spoil;
  };
  const std::vector<Case> cases{
      {{.temperature = 900}, false},
      {{.temperature = 900, .top_p = 0.99}, false},
      {{.temperature = 900, .repetition_penalty = 0.5}, false},
      {{.temperature = 40, .top_k = 5}, true},
      {{.temperature = 40, .top_k = 6, .top_p = 0.8, .repetition_penalty = 1.01}, true},
      {{.temperature = 1, .top_p = 0.9}, true},
      {{.repetition_penalty = 1.01}, true},
  };
  for (const auto& [params, spoil] : cases) {
    if (spoil) artifact.spoil_sampled_logits();
    for (std::uint64_t seed = 0; seed < 8; ++seed) {
      Ids ids = range(6);
      Sampler sampler(params, seed);
      for (int i = 0; i < 4; ++i) {
        Logits logits = artifact.expected(ids);
        ids.push_back(sampler.sample(logits, ids));
      }
      const Ids tokens(ids.begin() + 6, ids.end());
      const auto fails = [](std::int32_t id) { return id == fake::kErrorId || id == fake::kNanId; };
      if (std::ranges::any_of(tokens, fails)) continue;
      Sequence sequence(model.get());
      EXPECT_EQ(generate(sequence, range(6), params, seed), tokens)
          << "temperature " << params.temperature << ", seed " << seed;
    }
  }
}

TEST_P(GpuModels, ForwardGivesEveryRowAcrossSteps) {
  const FakeHybrid artifact(GetParam());
  const ModelPtr model = load(artifact);
  const Sequence sequence(model.get());
  const Ids ids = range(23);
  Logits logits(ids.size() * fake::kVocab);
  check(hetcomp_forward(sequence.session.get(), ids.data(), 23, logits.data()));
  for (long t = 0; t < 23; ++t) {
    const auto row = logits.begin() + t * fake::kVocab;
    EXPECT_EQ(Logits(row, row + fake::kVocab), artifact.expected(Ids(ids.begin(), ids.begin() + t + 1))) << t;
  }
  // Five tokens at a time, for so many rows of logits has a step; the last three on the graph of four.
  EXPECT_EQ(statistics(model.get())["gpu"]["steps_by_batch"], (Json{{"4", 1}, {"7", 4}}));
}

// Two sessions of different lengths, three of them, one: padded and not, by tokens that come in between.
TEST_P(GpuModels, DecodeOfSeveralSessionsOnPaddedGraphs) {
  const FakeHybrid artifact(GetParam());
  const ModelPtr model = load(artifact);
  Sequence a(model.get());
  Sequence b(model.get());
  Sequence c(model.get());
  EXPECT_EQ(a.prefill(range(9)), artifact.expected(range(9)));
  EXPECT_EQ(b.prefill({40}), artifact.expected({40}));
  EXPECT_EQ(c.prefill(range(3, 50)), artifact.expected(range(3, 50)));
  check(hetcomp_model_reset_stats(model.get()));
  for (std::int32_t i = 0; i < 5; ++i) {
    expect_decode(model.get(), artifact, {&c, &a, &b}, {60 + i, 70 + i, 80 + i});
    expect_decode(model.get(), artifact, {&b, &a}, {30 + i, 20 + i});
    expect_decode(model.get(), artifact, {&a}, {90 - i});
  }
  EXPECT_EQ(statistics(model.get())["gpu"]["steps_by_batch"], (Json{{"1", 5}, {"4", 10}}));
}

TEST_P(GpuModels, PaddingAtTheEndOfTheContext) {
  const FakeHybrid artifact(GetParam());
  const ModelPtr model = load(artifact);
  std::vector<Sequence> sequences;
  std::vector<Sequence*> all;
  for (std::int32_t i = 0; i < FakeArtifact::kMaxBatch; ++i) sequences.emplace_back(model.get());
  for (Sequence& sequence : sequences) all.push_back(&sequence);
  // One is full, two are; rows that pad the graph of four write to nobody's place.
  for (Sequence& sequence : sequences)
    sequence.prefill(range(39, 20 + 3 * static_cast<int>(&sequence - &sequences[0])));
  check(hetcomp_model_reset_stats(model.get()));
  expect_decode(model.get(), artifact, {all[2]}, {33});
  expect_decode(model.get(), artifact, {all[0], all[1]}, {44, 55});
  EXPECT_EQ(statistics(model.get())["gpu"]["steps_by_batch"], (Json{{"1", 1}, {"4", 1}}));
  for (Sequence& sequence : sequences) {
    check(hetcomp_session_truncate(sequence.session.get(), 39));
    sequence.ids.resize(39);
  }
  expect_decode(model.get(), artifact, all, {44, 55, 66});
  EXPECT_EQ(statistics(model.get())["gpu"]["steps_by_batch"]["4"], 2);
}

TEST_P(GpuModels, InfoAndStatistics) {
  const FakeHybrid artifact(GetParam());
  fake_.device_bytes = 0;
  const ModelPtr model = load(artifact);
  hetcomp_model_info info;
  hetcomp_model_info_init(&info);
  check(hetcomp_model_get_info(model.get(), &info));
  EXPECT_STREQ(info.gpu, "Fake GPU");
  EXPECT_EQ(info.gpu_bytes, static_cast<std::int64_t>(fake_.device_bytes));
  EXPECT_GT(info.gpu_bytes, FakeArtifact::kMaxBatch * FakeArtifact::kContext * fake::kWidth * 4);
  Sequence(model.get()).prefill(range(10));
  const Json stats = statistics(model.get());
  ASSERT_EQ(info.n_gpus, 1);
  EXPECT_STREQ(info.gpus[0].name, "Fake GPU");
  EXPECT_EQ(info.gpus[0].bytes, info.gpu_bytes);
  EXPECT_EQ(stats["gpu"],
            (Json{{"devices", {{{"name", "Fake GPU"}, {"number", 0}, {"bytes", info.gpu_bytes}}}},
                  {"steps", 2},
                  {"steps_by_batch", {{"4", 1}, {"7", 1}}}}));
  EXPECT_EQ(stats["prefill"]["tokens"], 10);
  if (GetParam() == FakeHybrid::Parts::kGpu) return;
  EXPECT_EQ(stats["weight_bytes"], fake::kWidth * 4);  // the CPU's
  EXPECT_EQ(stats["kv_cache_bytes"], 0);
  EXPECT_EQ(stats["arena_bytes"], 0);
  EXPECT_EQ(stats["prefill"]["timers_ms"]["append"], 2.0);
}

TEST_P(GpuModels, StepThatCannotBeLaunched) {
  const FakeHybrid artifact(GetParam());
  const ModelPtr model = load(artifact);
  Sequence sequence(model.get());
  sequence.prefill(range(5));
  fake_.calls = 0;
  fake_.fail_call = 2;  // the copy of the step, then the launch
  Logits logits(fake::kVocab);
  const Ids next{40};
  EXPECT_EQ(hetcomp_prefill(sequence.session.get(), next.data(), 1, logits.data()), HETCOMP_COMPUTE);
  EXPECT_NE(std::string(hetcomp_last_error()).find("cuGraphLaunch"), std::string::npos)
      << hetcomp_last_error();
  EXPECT_EQ(sequence.length(), 5);
  expect_decode(model.get(), artifact, {&sequence}, {41});
}

TEST_F(HybridModels, StepsSayWhetherExpertsAreDeferred) {
  const FakeHybrid artifact(FakeHybrid::Parts::kGpuAndCpu);
  const ModelPtr model = load(artifact);
  // Whether the steps of a prompt did, and that of a token behind it.
  const auto deferring = [&] {
    check(hetcomp_model_reset_stats(model.get()));
    Sequence sequence(model.get());
    sequence.prefill(range(3));
    expect_decode(model.get(), artifact, {&sequence}, {25});
    const Json stats = statistics(model.get());
    return std::pair(stats["prefill"]["timers_ms"]["timer 1"] > 0,
                     stats["decode"]["timers_ms"]["timer 1"] > 0);
  };
  EXPECT_EQ(deferring(), std::pair(false, true));
  check(hetcomp_model_set_deferral(model.get(), HETCOMP_DEFER_ALL));
  EXPECT_EQ(deferring(), std::pair(true, true));
  check(hetcomp_model_set_deferral(model.get(), HETCOMP_DEFER_NONE));
  EXPECT_EQ(deferring(), std::pair(false, false));
  check(hetcomp_model_set_deferral(model.get(), HETCOMP_DEFER_GENERATED));
  EXPECT_EQ(deferring(), std::pair(false, true));
  EXPECT_EQ(hetcomp_model_set_deferral(nullptr, HETCOMP_DEFER_ALL), HETCOMP_INVALID_ARGUMENT);
  EXPECT_EQ(hetcomp_model_set_deferral(model.get(), static_cast<hetcomp_deferral>(3)),
            HETCOMP_INVALID_ARGUMENT);
}

TEST_F(HybridModels, ErrorOfAKernelOfTheCpu) {
  const FakeHybrid artifact;
  const ModelPtr model = load(artifact);
  Sequence sequence(model.get());
  sequence.prefill(range(5));
  Logits logits(fake::kVocab);
  EXPECT_EQ(hetcomp_prefill(sequence.session.get(), &fake::kErrorId, 1, logits.data()), HETCOMP_COMPUTE);
  EXPECT_NE(std::string(hetcomp_last_error()).find("error 13"), std::string::npos) << hetcomp_last_error();
  EXPECT_EQ(sequence.length(), 5);
  expect_decode(model.get(), artifact, {&sequence}, {41});
}

// Several lanes leave a step that the GPU never gets on with; the next one works.
TEST_F(HybridModels, StepThatIsGivenUpBecauseTheGpuHangs) {
  const FakeHybrid artifact;
  LoadOptions patient{};
  patient.threads = static_cast<int>(std::min(2U, std::thread::hardware_concurrency()));
  patient.gpu.patience = std::chrono::milliseconds(60);
  const auto model = std::make_shared<Model>(artifact.path(), patient);
  Session session(model);
  Logits logits(fake::kVocab);
  session.prefill(range(6), logits.data());
  for (int round = 0; round < 3; ++round) {
    fake_.hang = true;
    std::jthread other([&] {
      std::this_thread::sleep_for(std::chrono::milliseconds(200));
      fake_.hang = false;
    });
    try {
      session.prefill(range(3, 41), logits.data());
      ADD_FAILURE() << "no error";
    } catch (const Error& error) {
      EXPECT_EQ(error.status(), HETCOMP_COMPUTE);
      EXPECT_NE(std::string(error.what()).find("hand-over 0 within 60 ms"), std::string::npos)
          << error.what();
    }
    other.join();
    EXPECT_EQ(session.length(), 6);
    session.prefill(range(3, 33), logits.data());
    Ids ids = range(6);
    for (const std::int32_t id : range(3, 33)) ids.push_back(id);
    EXPECT_EQ(logits, artifact.expected(ids));
    session.truncate(6);
  }
}

}  // namespace
}  // namespace hetcomp
