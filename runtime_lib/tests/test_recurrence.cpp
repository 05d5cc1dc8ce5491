// Sessions of a model whose states cannot be cut back: what truncation, reuse and failed steps leave.
#include <gtest/gtest.h>

#include <memory>
#include <nlohmann/json.hpp>

#include "cli/handles.h"
#include "fake_artifact.h"
#include "fake_program.h"
#include "file.h"
#include "hetcomp/hetcomp.h"

namespace hetcomp {
namespace {

using cli::ModelPtr;
using cli::SessionPtr;
using fake::FakeArtifact;
using Ids = std::vector<std::int32_t>;

class Recurrence : public testing::Test {
 protected:
  void SetUp() override {
    namespace fs = std::filesystem;
    const fs::path program = artifact_.file("kernels/lib.so");
    fs::copy_file(FAKE_RECURRENCE, program, fs::copy_options::overwrite_existing);
    nlohmann::json manifest = artifact_.manifest();
    manifest["files"]["kernels/lib.so"] = {{"bytes", fs::file_size(program)},
                                           {"sha256", File(program).sha256()}};
    manifest["model"]["recurrent"] = true;
    manifest["states"] = {
        {{"name", "delta"}, {"bytes_per_slot", fake::kWidth * 4}, {"rows", nlohmann::json::array()}}};
    artifact_.write_manifest(manifest);
    model_ = load();
    ASSERT_NE(model_, nullptr) << hetcomp_last_error();
  }

  ModelPtr load() {
    hetcomp_model* model = nullptr;
    hetcomp_load(artifact_.path().c_str(), nullptr, &model);
    return ModelPtr(model);
  }

  SessionPtr session() {
    hetcomp_session* session = nullptr;
    EXPECT_EQ(hetcomp_session_create(model_.get(), &session), HETCOMP_OK) << hetcomp_last_error();
    return SessionPtr(session);
  }

  static std::vector<float> prefill(hetcomp_session* session, const Ids& ids) {
    std::vector<float> logits(fake::kVocab);
    const auto n = static_cast<std::int64_t>(ids.size());
    EXPECT_EQ(hetcomp_prefill(session, ids.data(), n, logits.data()), HETCOMP_OK) << hetcomp_last_error();
    return logits;
  }

  // Of a session that has never had other tokens.
  std::vector<float> fresh(const Ids& ids) {
    const SessionPtr s = session();
    return prefill(s.get(), ids);
  }

  std::int64_t tokens(const char* phase) {
    char* text = nullptr;
    EXPECT_EQ(hetcomp_model_stats(model_.get(), &text), HETCOMP_OK);
    const cli::Buffer<char> owner(text);
    return nlohmann::json::parse(text)[phase]["tokens"].get<std::int64_t>();
  }

  FakeArtifact artifact_;
  ModelPtr model_;
};

Ids range(std::int32_t n, std::int32_t first = 20) {
  Ids ids;
  for (std::int32_t i = 0; i < n; ++i) ids.push_back(first + (i * 31) % 50);
  return ids;
}

Ids joined(Ids a, const Ids& b) {
  a.insert(a.end(), b.begin(), b.end());
  return a;
}

TEST_F(Recurrence, GoesOnAfterTruncation) {
  const Ids ids = range(17), more = range(4, 23);
  const SessionPtr s = session();
  prefill(s.get(), ids);
  EXPECT_EQ(prefill(s.get(), more), fresh(joined(ids, more)));
  for (const std::int64_t length : {17, 9, 8, 1, 0}) {
    ASSERT_EQ(hetcomp_session_truncate(s.get(), length), HETCOMP_OK);
    const Ids kept(ids.begin(), ids.begin() + length);
    EXPECT_EQ(prefill(s.get(), more), fresh(joined(kept, more))) << length;
    ASSERT_EQ(hetcomp_session_truncate(s.get(), length), HETCOMP_OK);
  }
}

TEST_F(Recurrence, ComputesNothingTwiceUnlessItMust) {
  const SessionPtr s = session();
  prefill(s.get(), range(10));  // in two steps, the second behind 7 tokens
  ASSERT_EQ(hetcomp_session_truncate(s.get(), 10), HETCOMP_OK);
  prefill(s.get(), range(3));
  EXPECT_EQ(tokens("prefill"), 13);
  // The last checkpoints are at 7 and 10.
  ASSERT_EQ(hetcomp_session_truncate(s.get(), 12), HETCOMP_OK);
  prefill(s.get(), range(2));
  EXPECT_EQ(tokens("prefill"), 13 + 2 + 2);
  ASSERT_EQ(hetcomp_session_truncate(s.get(), 9), HETCOMP_OK);
  prefill(s.get(), range(2));
  EXPECT_EQ(tokens("prefill"), 17 + 9 + 2);
}

TEST_F(Recurrence, GoesOnFromACheckpoint) {
  const Ids ids = range(17), more = {90, 91, 92, 93};  // steps begin at 0, 7, 14
  for (const std::int64_t length : {16, 14, 13, 7, 6}) {
    const SessionPtr s = session();
    prefill(s.get(), ids);
    ASSERT_EQ(hetcomp_model_reset_stats(model_.get()), HETCOMP_OK);
    Ids other(ids.begin(), ids.begin() + length);
    other = joined(other, more);
    std::int64_t kept = -1;
    ASSERT_EQ(hetcomp_session_reuse(s.get(), other.data(), static_cast<std::int64_t>(other.size()), &kept),
              HETCOMP_OK);
    EXPECT_EQ(kept, length >= 14 ? 14 : length >= 7 ? 7 : 0);
    const Ids rest(other.begin() + kept, other.end());
    const std::vector<float> logits = prefill(s.get(), rest);
    EXPECT_EQ(tokens("prefill"), static_cast<std::int64_t>(rest.size()));
    EXPECT_EQ(logits, fresh(other));
  }
}

TEST_F(Recurrence, ReusesAPrefixThatIsAllOfIt) {
  const Ids ids = range(12);
  const SessionPtr s = session();
  std::int64_t kept = -1;
  prefill(s.get(), ids);
  const Ids longer = joined(ids, {30, 31});
  ASSERT_EQ(hetcomp_session_reuse(s.get(), longer.data(), 14, &kept), HETCOMP_OK);
  EXPECT_EQ(kept, 12);
  EXPECT_EQ(prefill(s.get(), {30, 31}), fresh(longer));
  // One token must remain to be computed, and the state is behind it: its last step is, too.
  ASSERT_EQ(hetcomp_session_reuse(s.get(), longer.data(), 14, &kept), HETCOMP_OK);
  EXPECT_EQ(kept, 12);
  EXPECT_EQ(prefill(s.get(), {30, 31}), fresh(longer));
}

TEST_F(Recurrence, IsWholeAgainAfterAFailedStep) {
  const Ids ids = range(9);
  const SessionPtr s = session(), t = session();
  prefill(s.get(), ids);
  prefill(t.get(), ids);
  const Ids bad{fake::kErrorId};
  ASSERT_EQ(hetcomp_prefill(s.get(), bad.data(), 1, nullptr), HETCOMP_COMPUTE);
  EXPECT_EQ(prefill(s.get(), {40}), fresh(joined(ids, {40})));
  // In a decode step of several all fail, and all go on.
  hetcomp_session* const both[] = {s.get(), t.get()};
  std::vector<float> logits(2 * fake::kVocab);
  const Ids one_bad{41, fake::kErrorId}, good{41, 42};
  ASSERT_EQ(hetcomp_decode(model_.get(), both, one_bad.data(), 2, logits.data()), HETCOMP_COMPUTE);
  ASSERT_EQ(hetcomp_decode(model_.get(), both, good.data(), 2, logits.data()), HETCOMP_OK);
  const std::vector<float> first(logits.begin(), logits.begin() + fake::kVocab);
  const std::vector<float> second(logits.begin() + fake::kVocab, logits.end());
  EXPECT_EQ(first, fresh(joined(ids, {40, 41})));
  EXPECT_EQ(second, fresh(joined(ids, {42})));
}

TEST_F(Recurrence, ASlotThatWasAnothersBeginsAnew) {
  const Ids ids = range(5);
  const std::vector<float> expected = fresh(ids);
  for (int i = 0; i < 2 * FakeArtifact::kMaxBatch; ++i) EXPECT_EQ(fresh(ids), expected);
}

TEST_F(Recurrence, StatesWithoutRowsAreRefusedElsewhere) {
  nlohmann::json manifest = artifact_.manifest();
  manifest["model"]["recurrent"] = false;
  artifact_.write_manifest(manifest);
  EXPECT_EQ(load(), nullptr);
  EXPECT_NE(std::string(hetcomp_last_error()).find("rows"), std::string::npos) << hetcomp_last_error();
}

}  // namespace
}  // namespace hetcomp
