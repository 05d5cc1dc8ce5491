// Load, sessions, forward, decode and generate through the C ABI, over an artifact with exact results.
#include <gtest/gtest.h>
#include <sys/wait.h>
#include <unistd.h>

#include <algorithm>
#include <atomic>
#include <memory>
#include <nlohmann/json.hpp>
#include <thread>

#include "cli/handles.h"
#include "fake_artifact.h"
#include "fake_program.h"
#include "hetcomp/hetcomp.h"

namespace hetcomp {
namespace {

using cli::ModelPtr;
using cli::SessionPtr;
using fake::FakeArtifact;
using Ids = std::vector<std::int32_t>;

std::string last_error() { return hetcomp_last_error(); }

class Model : public testing::TestWithParam<hetcomp_weights> {
 protected:
  void SetUp() override { model_ = load(GetParam()); }

  ModelPtr load(hetcomp_weights weights) {
    hetcomp_load_options options;
    hetcomp_load_options_init(&options);
    options.weights = weights;
    hetcomp_model* model = nullptr;
    EXPECT_EQ(hetcomp_load(artifact_.path().c_str(), &options, &model), HETCOMP_OK) << last_error();
    return ModelPtr(model);
  }

  SessionPtr session() {
    hetcomp_session* session = nullptr;
    EXPECT_EQ(hetcomp_session_create(model_.get(), &session), HETCOMP_OK) << last_error();
    return SessionPtr(session);
  }

  std::vector<float> forward(hetcomp_session* session, const Ids& ids) {
    std::vector<float> logits(ids.size() * fake::kVocab);
    EXPECT_EQ(hetcomp_forward(session, ids.data(), static_cast<std::int64_t>(ids.size()), logits.data()),
              HETCOMP_OK)
        << last_error();
    return logits;
  }

  std::vector<float> prefill(hetcomp_session* session, const Ids& ids) {
    std::vector<float> logits(fake::kVocab);
    EXPECT_EQ(hetcomp_prefill(session, ids.data(), static_cast<std::int64_t>(ids.size()), logits.data()),
              HETCOMP_OK)
        << last_error();
    return logits;
  }

  static std::int64_t length(const hetcomp_session* session) {
    std::int64_t length = -1;
    EXPECT_EQ(hetcomp_session_length(session, &length), HETCOMP_OK);
    return length;
  }

  FakeArtifact artifact_;
  ModelPtr model_;
};
INSTANTIATE_TEST_SUITE_P(Weights, Model,
                         testing::Values(HETCOMP_WEIGHTS_AUTO, HETCOMP_WEIGHTS_MMAP, HETCOMP_WEIGHTS_RAM));

Ids range(std::int32_t n) {
  Ids ids;
  for (std::int32_t i = 0; i < n; ++i) ids.push_back(20 + (i * 31) % 70);
  return ids;
}

TEST_P(Model, ForwardGivesEveryRowAcrossSteps) {
  const Ids ids = range(23);
  const SessionPtr s = session();
  const std::vector<float> logits = forward(s.get(), ids);
  for (std::size_t t = 0; t < ids.size(); ++t) {
    const std::vector<float> expected =
        artifact_.expected(Ids(ids.begin(), ids.begin() + static_cast<long>(t) + 1));
    EXPECT_TRUE(
        std::equal(expected.begin(), expected.end(), logits.begin() + static_cast<long>(t * fake::kVocab)))
        << t;
  }
  EXPECT_EQ(length(s.get()), 23);
}

TEST_P(Model, PrefillTruncateAndReuse) {
  const Ids ids = range(20);
  const SessionPtr s = session();
  EXPECT_EQ(prefill(s.get(), ids), artifact_.expected(ids));
  ASSERT_EQ(hetcomp_session_truncate(s.get(), 12), HETCOMP_OK);
  Ids other(ids.begin(), ids.begin() + 12);
  EXPECT_EQ(prefill(s.get(), {30, 31}), artifact_.expected([&] {
    Ids all = other;
    all.insert(all.end(), {30, 31});
    return all;
  }()));
  EXPECT_NE(hetcomp_session_truncate(s.get(), 15), HETCOMP_OK);
  EXPECT_NE(hetcomp_session_truncate(s.get(), -1), HETCOMP_OK);

  std::int64_t kept = -1;  // ids and the session agree on 12 tokens
  ASSERT_EQ(hetcomp_session_reuse(s.get(), ids.data(), 20, &kept), HETCOMP_OK);
  EXPECT_EQ(kept, 12);
  EXPECT_EQ(prefill(s.get(), Ids(ids.begin() + 12, ids.end())), artifact_.expected(ids));
  ASSERT_EQ(hetcomp_session_reuse(s.get(), ids.data(), 20, &kept), HETCOMP_OK);
  EXPECT_EQ(kept, 19);  // one must remain to be computed
  ASSERT_EQ(hetcomp_session_reset(s.get()), HETCOMP_OK);
  EXPECT_EQ(length(s.get()), 0);
}

TEST_P(Model, DecodeStepsSeveralSequencesOfDifferentLength) {
  const SessionPtr a = session();
  const SessionPtr b = session();
  const SessionPtr c = session();
  Ids ids_a = range(9);
  Ids ids_b{40};
  Ids ids_c{50, 51, 52};
  prefill(a.get(), ids_a);
  prefill(b.get(), ids_b);
  prefill(c.get(), ids_c);
  for (std::int32_t i = 0; i < 5; ++i) {
    hetcomp_session* const sessions[] = {c.get(), a.get(), b.get()};
    const Ids next{60 + i, 70 + i, 80 + i};
    ids_c.push_back(next[0]);
    ids_a.push_back(next[1]);
    ids_b.push_back(next[2]);
    std::vector<float> logits(3 * fake::kVocab);
    ASSERT_EQ(hetcomp_decode(model_.get(), sessions, next.data(), 3, logits.data()), HETCOMP_OK)
        << last_error();
    std::vector<float> expected;
    for (const Ids& ids : {ids_c, ids_a, ids_b}) {
      const std::vector<float> row = artifact_.expected(ids);
      expected.insert(expected.end(), row.begin(), row.end());
    }
    EXPECT_EQ(logits, expected);
  }
}

TEST_P(Model, RefusesSessionsBeyondTheBatchAndGivesSlotsBack) {
  std::vector<SessionPtr> all;
  for (std::int32_t i = 0; i < FakeArtifact::kMaxBatch; ++i) all.push_back(session());
  hetcomp_session* more = nullptr;
  EXPECT_EQ(hetcomp_session_create(model_.get(), &more), HETCOMP_NO_FREE_SLOT);
  EXPECT_NE(last_error().find("All 3 sequences"), std::string::npos) << last_error();
  all.erase(all.begin() + 1);
  const SessionPtr again = session();
  const Ids ids = range(4);
  EXPECT_EQ(prefill(again.get(), ids), artifact_.expected(ids));
}

TEST_P(Model, RefusesTokensThatDoNotFitAndComputesNothing) {
  const SessionPtr s = session();
  std::vector<float> logits(fake::kVocab);
  prefill(s.get(), range(30));
  EXPECT_EQ(hetcomp_prefill(s.get(), range(11).data(), 11, logits.data()), HETCOMP_CONTEXT_FULL);
  EXPECT_NE(last_error().find("context of 40 positions"), std::string::npos) << last_error();
  const Ids wrong{20, static_cast<std::int32_t>(fake::kVocab)};
  EXPECT_EQ(hetcomp_prefill(s.get(), wrong.data(), 2, logits.data()), HETCOMP_INVALID_ARGUMENT);
  EXPECT_NE(last_error().find("Token id 97 at position 1"), std::string::npos) << last_error();
  const Ids negative{-1};
  EXPECT_EQ(hetcomp_forward(s.get(), negative.data(), 1, logits.data()), HETCOMP_INVALID_ARGUMENT);
  EXPECT_EQ(hetcomp_prefill(s.get(), negative.data(), 0, logits.data()), HETCOMP_INVALID_ARGUMENT);
  EXPECT_EQ(hetcomp_prefill(nullptr, negative.data(), 1, logits.data()), HETCOMP_INVALID_ARGUMENT);
  EXPECT_EQ(hetcomp_prefill(s.get(), nullptr, 1, logits.data()), HETCOMP_INVALID_ARGUMENT);
  EXPECT_EQ(length(s.get()), 30);
  hetcomp_session* const twice[] = {s.get(), s.get()};
  const Ids two{20, 21};
  std::vector<float> rows(2 * fake::kVocab);
  EXPECT_EQ(hetcomp_decode(model_.get(), twice, two.data(), 2, rows.data()), HETCOMP_INVALID_ARGUMENT);
  const ModelPtr other = load(GetParam());
  EXPECT_EQ(hetcomp_decode(other.get(), twice, two.data(), 1, rows.data()), HETCOMP_INVALID_ARGUMENT);
}

TEST_P(Model, KernelErrorBecomesAStatusAndTheModelGoesOn) {
  const SessionPtr s = session();
  std::vector<float> logits(fake::kVocab);
  const Ids bad{20, fake::kErrorId};
  EXPECT_EQ(hetcomp_prefill(s.get(), bad.data(), 2, logits.data()), HETCOMP_COMPUTE);
  EXPECT_EQ(length(s.get()), 0);
  EXPECT_EQ(prefill(s.get(), {20, 21}), artifact_.expected({20, 21}));
}

struct Collected {
  Ids ids;
  std::string text;
  int stop_after = -1;
};

int collect(const hetcomp_token* token, void* user) {
  auto& collected = *static_cast<Collected*>(user);
  collected.ids.push_back(token->id);
  collected.text.append(token->text, token->text_length);
  return static_cast<int>(collected.ids.size()) == collected.stop_after ? 1 : 0;
}

TEST_P(Model, GreedyGenerationFollowsTheLogits) {
  Ids all = range(17);
  Ids expected;
  for (int i = 0; i < 12; ++i) {
    expected.push_back(artifact_.expected_next(all));
    all.push_back(expected.back());
  }
  const SessionPtr s = session();
  hetcomp_generate_params params;
  hetcomp_generate_params_init(&params);
  params.max_new_tokens = 12;
  params.ignore_eos = 1;
  Collected out;
  std::int32_t finish = -1;
  ASSERT_EQ(hetcomp_generate(s.get(), range(17).data(), 17, &params, collect, &out, &finish), HETCOMP_OK)
      << last_error();
  EXPECT_EQ(out.ids, expected);
  EXPECT_EQ(finish, HETCOMP_FINISH_LENGTH);
  EXPECT_EQ(length(s.get()), 17 + 11);  // the last token was not computed

  ASSERT_EQ(hetcomp_session_reset(s.get()), HETCOMP_OK);
  Collected cut{.ids = {}, .text = {}, .stop_after = 4};
  ASSERT_EQ(hetcomp_generate(s.get(), range(17).data(), 17, &params, collect, &cut, &finish), HETCOMP_OK);
  EXPECT_EQ(cut.ids, Ids(expected.begin(), expected.begin() + 4));
  EXPECT_EQ(finish, HETCOMP_FINISH_CALLBACK);
}

TEST_P(Model, GenerationEndsWithTheContext) {
  const SessionPtr s = session();
  hetcomp_generate_params params;
  hetcomp_generate_params_init(&params);
  params.max_new_tokens = 1000;
  params.ignore_eos = 1;
  Collected out;
  std::int32_t finish = -1;
  ASSERT_EQ(hetcomp_generate(s.get(), range(37).data(), 37, &params, collect, &out, &finish), HETCOMP_OK)
      << last_error();
  EXPECT_EQ(out.ids.size(), 4U);  // one after each of the positions 36 .. 39
  EXPECT_EQ(finish, HETCOMP_FINISH_CONTEXT);
}

// With a temperature so high that all tokens are about equally likely, EOS comes soon.
TEST_P(Model, GenerationEndsWithEos) {
  for (const std::int32_t ignore : {0, 1}) {
    int ended = 0;
    for (std::uint64_t seed = 0; seed < 40; ++seed) {
      const SessionPtr s = session();
      hetcomp_generate_params params;
      hetcomp_generate_params_init(&params);
      params.max_new_tokens = 30;
      params.temperature = 1e9;
      params.seed = seed;
      params.ignore_eos = ignore;
      Collected out;
      std::int32_t finish = -1;
      // Tokens that make errors may be drawn; such a run says nothing about EOS.
      if (hetcomp_generate(s.get(), range(3).data(), 3, &params, collect, &out, &finish) != HETCOMP_OK)
        continue;
      const bool has_eos = std::ranges::find(out.ids, FakeArtifact::kEosId) != out.ids.end();
      if (ignore != 0) {
        EXPECT_EQ(out.ids.size(), 30U);
        ended += has_eos ? 1 : 0;
      } else {
        EXPECT_EQ(finish == HETCOMP_FINISH_EOS, has_eos);
        if (has_eos) {
          EXPECT_EQ(out.ids.back(), FakeArtifact::kEosId);
        }
        ended += has_eos ? 1 : 0;
      }
    }
    EXPECT_GT(ended, 0);
  }
}

TEST_P(Model, GenerationStepByStep) {
  const SessionPtr s = session();
  hetcomp_generate_params params;
  hetcomp_generate_params_init(&params);
  params.max_new_tokens = 2;
  params.ignore_eos = 1;
  hetcomp_generation* raw = nullptr;
  const Ids prompt = range(16);  // three steps of at most 7 tokens
  ASSERT_EQ(hetcomp_generation_start(s.get(), prompt.data(), 16, &params, &raw), HETCOMP_OK) << last_error();
  const cli::GenerationPtr generation(raw);
  Ids ids;
  std::vector<std::int32_t> finishes;
  for (int i = 0; i < 6; ++i) {
    hetcomp_token token;
    ASSERT_EQ(hetcomp_generation_next(generation.get(), &token), HETCOMP_OK);
    ids.push_back(token.id);
    finishes.push_back(token.finish);
  }
  Ids all = prompt;
  const std::int32_t first = artifact_.expected_next(all);
  all.push_back(first);
  EXPECT_EQ(ids, (Ids{-1, -1, first, artifact_.expected_next(all), -1, -1}));
  EXPECT_EQ(finishes, (std::vector<std::int32_t>{0, 0, 0, HETCOMP_FINISH_LENGTH, HETCOMP_FINISH_LENGTH,
                                                 HETCOMP_FINISH_LENGTH}));
}

TEST_P(Model, GenerationRefusesWhatItCannotDo) {
  const SessionPtr s = session();
  hetcomp_generate_params params;
  hetcomp_generate_params_init(&params);
  std::int32_t finish = 0;
  const Ids nan{20, fake::kNanId};
  EXPECT_EQ(hetcomp_generate(s.get(), nan.data(), 2, &params, nullptr, nullptr, &finish), HETCOMP_COMPUTE);
  EXPECT_NE(last_error().find("not finite"), std::string::npos) << last_error();
  const char* stop[] = {"x"};
  params.stop = stop;
  params.n_stop = 1;
  EXPECT_EQ(hetcomp_generate(s.get(), nan.data(), 1, &params, nullptr, nullptr, &finish),
            HETCOMP_NO_TOKENIZER);
  params.n_stop = 0;
  params.top_p = 2;
  EXPECT_EQ(hetcomp_generate(s.get(), nan.data(), 1, &params, nullptr, nullptr, &finish),
            HETCOMP_INVALID_ARGUMENT);
  params.top_p = 1;
  params.max_new_tokens = -1;
  EXPECT_EQ(hetcomp_generate(s.get(), nan.data(), 1, &params, nullptr, nullptr, &finish),
            HETCOMP_INVALID_ARGUMENT);
  params.struct_size = 1000;
  EXPECT_EQ(hetcomp_generate(s.get(), nan.data(), 1, &params, nullptr, nullptr, &finish),
            HETCOMP_INVALID_ARGUMENT);
}

TEST_P(Model, TextNeedsATokenizer) {
  std::int32_t* ids = nullptr;
  std::size_t n = 0;
  char* text = nullptr;
  EXPECT_EQ(hetcomp_tokenize(model_.get(), "a", 1, 1, 1, &ids, &n), HETCOMP_NO_TOKENIZER);
  EXPECT_EQ(hetcomp_detokenize(model_.get(), nullptr, 0, 1, &text, &n), HETCOMP_NO_TOKENIZER);
  EXPECT_EQ(hetcomp_chat_render(model_.get(), "{}", 2, &text, &n), HETCOMP_NO_TOKENIZER);
}

TEST_P(Model, StatisticsCountTokensAndTimers) {
  const SessionPtr s = session();
  prefill(s.get(), range(15));
  for (int i = 0; i < 4; ++i) prefill(s.get(), {20});
  char* text = nullptr;
  ASSERT_EQ(hetcomp_model_stats(model_.get(), &text), HETCOMP_OK);
  const nlohmann::json stats = nlohmann::json::parse(text);
  hetcomp_free(text);
  EXPECT_EQ(stats["prefill"]["tokens"], 15);
  EXPECT_EQ(stats["prefill"]["steps"], 3);
  EXPECT_EQ(stats["decode"]["tokens"], 4);
  EXPECT_EQ(stats["decode"]["timers_ms"]["append"], 4.0);
  EXPECT_EQ(stats["decode"]["timers_ms"]["timer 1"], 0.0);
  EXPECT_GT(stats["decode"]["tokens_per_second"], 0.0);
  EXPECT_EQ(stats["weight_bytes"], 2 * fake::kVocab * fake::kWidth * 4);
  ASSERT_EQ(hetcomp_model_reset_stats(model_.get()), HETCOMP_OK);
  ASSERT_EQ(hetcomp_model_stats(model_.get(), &text), HETCOMP_OK);
  EXPECT_EQ(nlohmann::json::parse(text)["decode"]["tokens"], 0);
  hetcomp_free(text);
}

TEST_P(Model, InfoSaysWhatTheManifestSays) {
  hetcomp_model_info info;
  hetcomp_model_info_init(&info);
  ASSERT_EQ(hetcomp_model_get_info(model_.get(), &info), HETCOMP_OK);
  EXPECT_EQ(info.vocab, fake::kVocab);
  EXPECT_EQ(info.context, FakeArtifact::kContext);
  EXPECT_EQ(info.max_batch, FakeArtifact::kMaxBatch);
  EXPECT_EQ(info.bos_token_id, -1);
  ASSERT_EQ(info.n_eos_token_ids, 1);
  EXPECT_EQ(info.eos_token_ids[0], FakeArtifact::kEosId);
  EXPECT_STREQ(info.weights, GetParam() == HETCOMP_WEIGHTS_MMAP ? "mmap" : "ram");
  EXPECT_STREQ(info.isa, FAKE_ISA);
}

TEST_P(Model, SessionsOutliveTheModelsHandle) {
  const SessionPtr s = session();
  model_.reset();
  const Ids ids = range(5);
  EXPECT_EQ(prefill(s.get(), ids), artifact_.expected(ids));
}

TEST_P(Model, SeveralThreadsShareAModel) {
  std::vector<std::jthread> threads;
  std::atomic<int> wrong{0};
  for (std::int32_t t = 0; t < FakeArtifact::kMaxBatch; ++t) {
    threads.emplace_back([&, t] {
      for (int round = 0; round < 20; ++round) {
        const SessionPtr s = session();
        const Ids ids = range(8 + t);
        wrong += prefill(s.get(), ids) != artifact_.expected(ids);
      }
    });
  }
  threads.clear();
  EXPECT_EQ(wrong, 0);
}

#if !defined(__SANITIZE_THREAD__)  // TSan does not support running on after fork() from a threaded process
TEST_P(Model, AForkIsRefusedNotHung) {
  const SessionPtr s = session();
  const pid_t child = fork();
  if (child == 0) {
    std::vector<float> logits(fake::kVocab);
    const std::int32_t id = 20;
    _exit(hetcomp_prefill(s.get(), &id, 1, logits.data()));
  }
  int status = 0;
  ASSERT_EQ(waitpid(child, &status, 0), child);
  EXPECT_EQ(WEXITSTATUS(status), HETCOMP_INVALID_ARGUMENT);
}
#endif

TEST(Load, AnArtifactReplacedAtTheSamePathIsLoadedAnew) {
  const FakeArtifact artifact;
  hetcomp_model* first = nullptr;
  ASSERT_EQ(hetcomp_load(artifact.path().c_str(), nullptr, &first), HETCOMP_OK) << last_error();
  const ModelPtr keep(first);
  // Another build of the same program: other bytes, another inode, the same name.
  const std::filesystem::path program = artifact.file("kernels/lib.so");
  fake::write_file(artifact.file("kernels/new.so"), fake::read_file(program) + "x");
  std::filesystem::rename(artifact.file("kernels/new.so"), program);
  hetcomp_model* second = nullptr;
  EXPECT_EQ(hetcomp_load(artifact.path().c_str(), nullptr, &second), HETCOMP_BAD_ARTIFACT);
  EXPECT_NE(last_error().find("lib.so"), std::string::npos) << last_error();
}

}  // namespace
}  // namespace hetcomp
