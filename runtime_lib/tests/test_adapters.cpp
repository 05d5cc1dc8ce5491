// Adapters through the C ABI: loading and refusing files, which session has which, room for 32.
#include <gtest/gtest.h>

#include <atomic>
#include <memory>
#include <nlohmann/json.hpp>
#include <thread>

#include "cli/handles.h"
#include "fake_adapter.h"
#include "fake_artifact.h"
#include "fake_program.h"
#include "hetcomp/hetcomp.h"

namespace hetcomp {
namespace {

using cli::ModelPtr;
using cli::SessionPtr;
using fake::FakeAdapter;
using fake::FakeArtifact;
using Ids = std::vector<std::int32_t>;

const Ids kIds{20, 51, 33, 8};

class Adapters : public testing::Test {
 protected:
  void SetUp() override {
    hetcomp_model* model = nullptr;
    ASSERT_EQ(hetcomp_load(artifact_.path().c_str(), nullptr, &model), HETCOMP_OK) << hetcomp_last_error();
    model_.reset(model);
  }

  SessionPtr session() {
    hetcomp_session* session = nullptr;
    EXPECT_EQ(hetcomp_session_create(model_.get(), &session), HETCOMP_OK) << hetcomp_last_error();
    return SessionPtr(session);
  }

  static std::vector<float> prefill(hetcomp_session* session, const Ids& ids) {
    std::vector<float> logits(fake::kVocab);
    EXPECT_EQ(hetcomp_prefill(session, ids.data(), static_cast<std::int64_t>(ids.size()), logits.data()),
              HETCOMP_OK)
        << hetcomp_last_error();
    return logits;
  }

  std::string file(const std::string& name) const { return artifact_.file(name + ".hetlora").string(); }

  hetcomp_status load(const std::string& name) {
    return hetcomp_adapter_load(model_.get(), file(name).c_str(), name.c_str());
  }
  void make(const std::string& name, const FakeAdapter& adapter) {
    adapter.write(file(name));
    EXPECT_EQ(load(name), HETCOMP_OK) << hetcomp_last_error();
  }

  nlohmann::json list() const {
    char* json = nullptr;
    EXPECT_EQ(hetcomp_adapter_list(model_.get(), &json), HETCOMP_OK);
    nlohmann::json found = nlohmann::json::parse(json);
    hetcomp_free(json);
    return found;
  }

  // Writes the file, and expects that it is refused with this in the sentence.
  void expect_refused(const std::string& what, const std::function<void(nlohmann::json&)>& change,
                      const std::function<void(std::string&)>& spoil = nullptr, bool hash_after = true) {
    FakeAdapter(1).write(file("bad"), change, spoil, hash_after);
    EXPECT_EQ(load("bad"), HETCOMP_BAD_ARTIFACT) << what;
    EXPECT_NE(std::string(hetcomp_last_error()).find(what), std::string::npos) << hetcomp_last_error();
    EXPECT_EQ(list().size(), 0U);
  }

  FakeArtifact artifact_;
  ModelPtr model_;
};

TEST_F(Adapters, SessionsOfOneStepHaveDifferentOnes) {
  const FakeAdapter first(1), second(2, 8);
  make("first", first);
  make("second", second);
  const SessionPtr base = session(), a = session(), b = session();
  ASSERT_EQ(hetcomp_session_set_adapter(a.get(), "first"), HETCOMP_OK) << hetcomp_last_error();
  ASSERT_EQ(hetcomp_session_set_adapter(b.get(), "second"), HETCOMP_OK);
  EXPECT_EQ(prefill(base.get(), kIds), artifact_.expected(kIds));
  EXPECT_EQ(prefill(a.get(), kIds), first.expected(artifact_, kIds));
  EXPECT_EQ(prefill(b.get(), kIds), second.expected(artifact_, kIds));
  EXPECT_NE(first.expected(artifact_, kIds), artifact_.expected(kIds));

  hetcomp_session* const all[] = {b.get(), base.get(), a.get()};
  const Ids next{40, 41, 42};
  std::vector<float> logits(3 * fake::kVocab);
  ASSERT_EQ(hetcomp_decode(model_.get(), all, next.data(), 3, logits.data()), HETCOMP_OK);
  const auto row = [&](std::size_t i) {
    return std::vector<float>(logits.begin() + static_cast<long>(i * fake::kVocab),
                              logits.begin() + static_cast<long>((i + 1) * fake::kVocab));
  };
  const auto then = [](std::int32_t id) {
    Ids ids = kIds;
    ids.push_back(id);
    return ids;
  };
  EXPECT_EQ(row(0), second.expected(artifact_, then(40)));
  EXPECT_EQ(row(1), artifact_.expected(then(41)));
  EXPECT_EQ(row(2), first.expected(artifact_, then(42)));
}

TEST_F(Adapters, ASessionForgetsItsTokensWithItsAdapter) {
  const FakeAdapter adapter(1);
  make("one", adapter);
  const SessionPtr s = session();
  prefill(s.get(), kIds);
  std::int64_t length = -1;
  ASSERT_EQ(hetcomp_session_set_adapter(s.get(), nullptr), HETCOMP_OK);  // as it was
  ASSERT_EQ(hetcomp_session_length(s.get(), &length), HETCOMP_OK);
  EXPECT_EQ(length, 4);
  EXPECT_EQ(hetcomp_session_set_adapter(s.get(), "another"), HETCOMP_NOT_FOUND);
  EXPECT_NE(std::string(hetcomp_last_error()).find("no adapter another among one"), std::string::npos);
  ASSERT_EQ(hetcomp_session_length(s.get(), &length), HETCOMP_OK);
  EXPECT_EQ(length, 4);
  ASSERT_EQ(hetcomp_session_set_adapter(s.get(), "one"), HETCOMP_OK);
  ASSERT_EQ(hetcomp_session_length(s.get(), &length), HETCOMP_OK);
  EXPECT_EQ(length, 0);
  EXPECT_EQ(prefill(s.get(), kIds), adapter.expected(artifact_, kIds));
  std::int64_t kept = -1;
  ASSERT_EQ(hetcomp_session_set_adapter(s.get(), nullptr), HETCOMP_OK);
  ASSERT_EQ(hetcomp_session_reuse(s.get(), kIds.data(), 4, &kept), HETCOMP_OK);
  EXPECT_EQ(kept, 0);
  EXPECT_EQ(prefill(s.get(), kIds), artifact_.expected(kIds));
}

TEST_F(Adapters, WhatIsInUseStays) {
  const FakeAdapter adapter(1);
  make("one", adapter);
  EXPECT_EQ(load("one"), HETCOMP_INVALID_ARGUMENT);  // the name is taken
  SessionPtr s = session();
  ASSERT_EQ(hetcomp_session_set_adapter(s.get(), "one"), HETCOMP_OK);
  EXPECT_EQ(list()[0]["sessions"], 1);
  EXPECT_EQ(hetcomp_adapter_unload(model_.get(), "one"), HETCOMP_INVALID_ARGUMENT);
  EXPECT_NE(std::string(hetcomp_last_error()).find("in use by 1 session:"), std::string::npos);
  EXPECT_EQ(prefill(s.get(), kIds), adapter.expected(artifact_, kIds));
  s.reset();
  EXPECT_EQ(hetcomp_adapter_unload(model_.get(), "one"), HETCOMP_OK) << hetcomp_last_error();
  EXPECT_EQ(hetcomp_adapter_unload(model_.get(), "one"), HETCOMP_NOT_FOUND);
  EXPECT_EQ(list().size(), 0U);
  make("one", FakeAdapter(2));
}

TEST_F(Adapters, TheOneWhoseUseIsLongestAgoMakesRoomAndComesBack) {
  const auto name = [](int i) { return "adapter" + std::to_string(i); };
  const SessionPtr s = session(), t = session();
  for (int i = 0; i < 32; ++i) make(name(i), FakeAdapter(i));
  ASSERT_EQ(hetcomp_session_set_adapter(s.get(), "adapter0"), HETCOMP_OK);  // in use
  ASSERT_EQ(hetcomp_session_set_adapter(t.get(), "adapter1"), HETCOMP_OK);  // was
  ASSERT_EQ(hetcomp_session_set_adapter(t.get(), nullptr), HETCOMP_OK);
  make("one more", FakeAdapter(100, 16));
  const auto resident = [&](const std::string& which) {
    for (const auto& adapter : list())
      if (adapter["name"] == which) return adapter["resident"].get<bool>();
    return false;
  };
  EXPECT_EQ(list().size(), 33U);
  EXPECT_FALSE(resident("adapter2"));
  EXPECT_TRUE(resident("adapter0") && resident("adapter1") && resident("one more"));
  EXPECT_EQ(prefill(s.get(), kIds), FakeAdapter(0).expected(artifact_, kIds));

  ASSERT_EQ(hetcomp_session_set_adapter(t.get(), "adapter2"), HETCOMP_OK) << hetcomp_last_error();
  EXPECT_TRUE(resident("adapter2"));
  EXPECT_FALSE(resident("adapter3"));
  EXPECT_EQ(prefill(t.get(), kIds), FakeAdapter(2).expected(artifact_, kIds));

  // Its file is another's now: it is refused, and what runs goes on.
  FakeAdapter(3).write(file("adapter3"), [](nlohmann::json& h) { h["sha256"] = std::string(64, 'b'); });
  EXPECT_EQ(hetcomp_session_set_adapter(t.get(), "adapter3"), HETCOMP_BAD_ARTIFACT);
  EXPECT_NE(std::string(hetcomp_last_error()).find("another adapter than when"), std::string::npos);
  EXPECT_EQ(hetcomp_adapter_unload(model_.get(), "adapter3"), HETCOMP_OK);
  EXPECT_EQ(prefill(t.get(), {7}), FakeAdapter(2).expected(artifact_, {20, 51, 33, 8, 7}));
}

TEST_F(Adapters, DamagedFilesAreRefused) {
  using Json = nlohmann::json;
  const auto weight = [](const char* key, const Json& value) {
    return [=](Json& h) { h["weights"][0][key] = value; };
  };
  EXPECT_EQ(load("missing"), HETCOMP_NOT_FOUND);
  expect_refused("another compiled model", [](Json& h) { h["plan"] = std::string(64, '0'); });
  FakeAdapter(1).write(file("newer"), [](Json& h) { h["schema"] = {3, 0}; });
  EXPECT_EQ(load("newer"), HETCOMP_NEWER_SCHEMA) << hetcomp_last_error();
  expect_refused("pack the adapter again", [](Json& h) { h["schema"] = {1, 0}; });
  expect_refused("must be", weight("weight", 0));
  expect_refused("must be", weight("weight", 2));
  expect_refused("must be head", weight("name", "embed"));
  expect_refused("must be", weight("rank", 0));
  expect_refused("a multiple of 4", weight("rank", 5));
  expect_refused("must be", weight("rank", 1 << 20));
  expect_refused("bytes of the data", weight("rank", 64));
  expect_refused("bytes of the data", weight("a", 4));
  expect_refused("bytes of the data", weight("b", 1024));
  expect_refused("must be", weight("b", 1 << 20));
  expect_refused("must be", weight("a", -64));
  expect_refused("named once", [](Json& h) { h["weights"].push_back(h["weights"][0]); });
  expect_refused("at least one weight", [](Json& h) { h["weights"] = Json::array(); });
  expect_refused("truncated", [](Json& h) { h["bytes"] = h["bytes"].get<int>() + 64; });
  expect_refused("do not have their hash", nullptr, [](std::string& data) { data[70] ^= 1; }, false);
  expect_refused("truncated", nullptr, [](std::string& data) { data.resize(100); }, false);
  const auto put = [](float number) {
    return [=](std::string& data) { std::memcpy(data.data() + 64, &number, sizeof number); };
  };
  expect_refused("NaN", nullptr, put(std::numeric_limits<float>::quiet_NaN()));
  expect_refused("NaN", nullptr, put(-std::numeric_limits<float>::infinity()));
}

TEST_F(Adapters, DamagedHeadersAreRefused) {
  FakeAdapter(1).write(file("good"));
  const std::string good = fake::read_file(file("good"));
  const auto refused = [&](std::string text) {
    fake::write_file(file("bad"), text);
    return load("bad") == HETCOMP_BAD_ARTIFACT;
  };
  for (const std::size_t size :
       {std::size_t{0}, std::size_t{7}, std::size_t{23}, std::size_t{30}, good.size() - 1})
    EXPECT_TRUE(refused(good.substr(0, size))) << size;
  for (const std::size_t at : {0U, 7U, 8U, 15U, 16U, 24U, 40U}) {
    std::string changed = good;
    changed[at] = static_cast<char>(changed[at] ^ 4);
    EXPECT_TRUE(refused(changed)) << at;
  }
  EXPECT_TRUE(refused(FakeAdapter::framed("[1, 2")));
  EXPECT_TRUE(refused(FakeAdapter::framed("{}")));
  EXPECT_EQ(load("good"), HETCOMP_OK) << hetcomp_last_error();
}

TEST_F(Adapters, ABadOneDisturbsNobody) {
  const FakeAdapter adapter(1);
  make("one", adapter);
  const SessionPtr s = session();
  ASSERT_EQ(hetcomp_session_set_adapter(s.get(), "one"), HETCOMP_OK);
  FakeAdapter(3).write(file("bad"), [](nlohmann::json& h) { h["weights"][0]["rank"] = 8; });
  std::atomic<bool> stop{false};
  std::thread other([&] {
    const FakeAdapter more(4, 16);
    more.write(file("more"));
    while (!stop) {
      EXPECT_EQ(load("bad"), HETCOMP_BAD_ARTIFACT);
      EXPECT_EQ(load("more"), HETCOMP_OK);
      EXPECT_EQ(hetcomp_adapter_unload(model_.get(), "more"), HETCOMP_OK);
    }
  });
  for (int i = 0; i < 20; ++i) {
    EXPECT_EQ(prefill(s.get(), kIds), adapter.expected(artifact_, kIds));
    ASSERT_EQ(hetcomp_session_reset(s.get()), HETCOMP_OK);
  }
  stop = true;
  other.join();
}

TEST_F(Adapters, NullArguments) {
  const SessionPtr s = session();
  EXPECT_EQ(hetcomp_adapter_load(nullptr, "a", "a"), HETCOMP_INVALID_ARGUMENT);
  EXPECT_EQ(hetcomp_adapter_load(model_.get(), nullptr, "a"), HETCOMP_INVALID_ARGUMENT);
  EXPECT_EQ(hetcomp_adapter_load(model_.get(), "a", nullptr), HETCOMP_INVALID_ARGUMENT);
  EXPECT_EQ(hetcomp_adapter_unload(model_.get(), nullptr), HETCOMP_INVALID_ARGUMENT);
  EXPECT_EQ(hetcomp_adapter_list(model_.get(), nullptr), HETCOMP_INVALID_ARGUMENT);
  EXPECT_EQ(hetcomp_session_set_adapter(nullptr, "a"), HETCOMP_INVALID_ARGUMENT);
  EXPECT_EQ(hetcomp_session_set_adapter(s.get(), ""), HETCOMP_NOT_FOUND);
  FakeAdapter(1).write(file("good"));
  EXPECT_EQ(hetcomp_adapter_load(model_.get(), file("good").c_str(), ""), HETCOMP_INVALID_ARGUMENT);
}

}  // namespace
}  // namespace hetcomp
