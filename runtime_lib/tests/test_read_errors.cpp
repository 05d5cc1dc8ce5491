// Weights that cannot be read any more while a model is open: requests are refused with a sentence, and when
// the file is right again so are results. Through the C ABI, with and without a GPU.
#include <gtest/gtest.h>
#include <unistd.h>

#include <chrono>
#include <thread>

#include "cli/handles.h"
#include "fake_gpu.h"
#include "fake_hybrid.h"
#include "fake_program.h"
#include "hetcomp/hetcomp.h"

namespace hetcomp {
namespace {

using cli::check;
using cli::ModelPtr;
using cli::SessionPtr;
using fake::FakeArtifact;
using fake::FakeHybrid;
using Ids = std::vector<std::int32_t>;
using Logits = std::vector<float>;

ModelPtr load_mapped(const std::filesystem::path& path, int threads = 2) {
  hetcomp_load_options options;
  hetcomp_load_options_init(&options);
  options.weights = HETCOMP_WEIGHTS_MMAP;
  options.threads = threads;
  hetcomp_model* model = nullptr;
  check(hetcomp_load(path.c_str(), &options, &model));
  return ModelPtr(model);
}

SessionPtr open(const ModelPtr& model) {
  hetcomp_session* session = nullptr;
  check(hetcomp_session_create(model.get(), &session));
  return SessionPtr(session);
}

std::int64_t length(const SessionPtr& session) {
  std::int64_t length = -1;
  check(hetcomp_session_length(session.get(), &length));
  return length;
}

Logits prefill(const SessionPtr& session, const Ids& ids) {
  Logits logits(fake::kVocab);
  check(hetcomp_prefill(session.get(), ids.data(), static_cast<std::int64_t>(ids.size()), logits.data()));
  return logits;
}

void expect_refused(hetcomp_status status, const std::string& file) {
  EXPECT_EQ(status, HETCOMP_IO);
  const std::string said = hetcomp_last_error();
  EXPECT_TRUE(said.starts_with("The weight ")) << said;
  EXPECT_NE(said.find(file + " could not be read at byte "), std::string::npos) << said;
  EXPECT_NE(said.find("the file was cut to 0 of its"), std::string::npos) << said;
}

class ReadErrors : public testing::Test {
 protected:
  const Ids head_{20, 30, 40}, tail_{41, 50};
  Ids all() const {
    Ids ids = head_;
    ids.insert(ids.end(), tail_.begin(), tail_.end());
    return ids;
  }

  // A prompt, a decode step of two sessions and a generation, each refused while the file is cut and right
  // when it is not.
  template <class Artifact>
  void go_through(const Artifact& artifact, const std::string& name) {
    const std::string file = (artifact.path() / name).string();
    const std::string content = fake::read_file(file);
    const ModelPtr model = load_mapped(artifact.path());
    const SessionPtr session = open(model), other = open(model);
    prefill(session, head_);
    prefill(other, head_);
    Logits logits(2 * fake::kVocab);
    for (int round = 0; round < 3; ++round) {
      ASSERT_EQ(truncate(file.c_str(), 0), 0);
      for (const SessionPtr* refused : {&session, &other, &session})
        expect_refused(hetcomp_prefill(refused->get(), tail_.data(), 2, logits.data()), file);
      hetcomp_session* const both[] = {session.get(), other.get()};
      expect_refused(hetcomp_decode(model.get(), both, tail_.data(), 2, logits.data()), file);
      EXPECT_EQ(length(session), 3);
      EXPECT_EQ(length(other), 3);
      fake::write_file(file, content);  // the same file, with its content again
      EXPECT_EQ(prefill(session, tail_), artifact.expected(all()));
      check(hetcomp_session_truncate(session.get(), 3));
    }
    EXPECT_EQ(prefill(other, tail_), artifact.expected(all()));
  }
};

TEST_F(ReadErrors, TheCpuAlone) { go_through(FakeArtifact(), "weights-00001.safetensors"); }

TEST_F(ReadErrors, BesideAGpu) {
  FakeCuda& cuda = fake::healthy_fake_cuda();
  {
    const FakeHybrid artifact;
    go_through(artifact, artifact.artifact().manifest()["weights"][0]["file"].get<std::string>());
  }
  EXPECT_EQ(cuda.live(), 0);
}

TEST_F(ReadErrors, AModelOfOtherFilesGoesOn) {
  const FakeArtifact bad, good;
  const ModelPtr refused = load_mapped(bad.path()), works = load_mapped(good.path());
  const SessionPtr first = open(refused), second = open(works);
  const std::string file = bad.file("weights-00001.safetensors").string();
  ASSERT_EQ(truncate(file.c_str(), 0), 0);
  // Both at once, on lanes of their own.
  std::jthread beside([&] {
    for (int i = 0; i < 50; ++i) {
      EXPECT_EQ(prefill(second, all()), good.expected(all()));
      check(hetcomp_session_reset(second.get()));
    }
  });
  Logits logits(fake::kVocab);
  for (int i = 0; i < 50; ++i)
    expect_refused(hetcomp_prefill(first.get(), head_.data(), 3, logits.data()), file);
}

TEST_F(ReadErrors, AGenerationSaysSoAndLeavesTheTokensBefore) {
  const FakeArtifact artifact;
  const ModelPtr model = load_mapped(artifact.path());
  const SessionPtr session = open(model);
  hetcomp_generate_params params;
  hetcomp_generate_params_init(&params);
  params.max_new_tokens = 8;
  params.ignore_eos = 1;
  hetcomp_generation* generation = nullptr;
  check(hetcomp_generation_start(session.get(), head_.data(), 3, &params, &generation));
  hetcomp_token token;
  check(hetcomp_generation_next(generation, &token));
  const std::int32_t first = token.id;
  EXPECT_EQ(first, artifact.expected_next(head_));
  const std::string file = artifact.file("weights-00001.safetensors").string();
  const std::string content = fake::read_file(file);
  ASSERT_EQ(truncate(file.c_str(), 0), 0);
  expect_refused(hetcomp_generation_next(generation, &token), file);
  fake::write_file(file, content);
  // The same step again.
  check(hetcomp_generation_next(generation, &token));
  Ids ids = head_;
  ids.push_back(first);
  EXPECT_EQ(token.id, artifact.expected_next(ids));
  hetcomp_generation_free(generation);
}

}  // namespace
}  // namespace hetcomp
