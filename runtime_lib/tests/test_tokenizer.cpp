// The tokenizer without HF at hand: streaming, special tokens, limits. Parity is
// tests/unit/test_tokenizer.py.
#include <gtest/gtest.h>

#include <nlohmann/json.hpp>
#include <string>
#include <thread>
#include <vector>

#include "tokenizer.h"
#include "utf8.h"

namespace hetcomp {
namespace {

using Json = nlohmann::ordered_json;

constexpr std::int32_t kHello = 256;  // "he" + "l": ids 256 and 257
constexpr std::int32_t kEnd = 258;    // <end>, special
constexpr std::int32_t kTool = 259;   // <tool>, not special
constexpr std::int32_t kHole = 260;   // no token has this id
constexpr std::int32_t kCount = 262;

Json added(std::int32_t id, const char* text, bool special) {
  return {{"id", id},        {"text", text},    {"special", special},  {"normalized", false},
          {"lstrip", false}, {"rstrip", false}, {"single_word", false}};
}

// 256 bytes, the merges h+e and he+l, two added tokens.
Json byte_level_json() {
  Json pieces = Json::array();
  for (char32_t byte = 0; byte < 256; ++byte) {
    std::string text;
    utf8_append(byte, &text);
    pieces.push_back(text);
  }
  for (const char* text : {"he", "hel", "<end>", "<tool>"}) pieces.push_back(text);
  pieces.push_back(nullptr);
  pieces.push_back("last");
  return {{"format", "hetcomp-tokenizer"},
          {"version", 1},
          {"byte_level", true},
          {"pieces", pieces},
          {"unreachable", {kEnd, kTool}},
          {"special", {kEnd}},
          {"merges", {'h', 'e', kHello, kHello, 'l', kHello + 1}},
          {"ignore_merges", false},
          {"fuse_unk", false},
          {"unk_id", nullptr},
          {"byte_tokens", nullptr},
          {"added_tokens", {added(kEnd, "<end>", true), added(kTool, "<tool>", false)}},
          {"word_class", nullptr},
          {"normalizers", {{{"kind", "nfc"}}}},
          {"pretokenizers", Json::array()},
          {"decoder",
           {{"byte_level", true},
            {"byte_fallback", false},
            {"replacements", Json::array()},
            {"strip", ""},
            {"strip_count", 0},
            {"metaspace", ""},
            {"drop_first", false}}},
          {"prefix", {kEnd}},
          {"suffix", Json::array()},
          {"bos_id", kEnd},
          {"eos_id", nullptr}};
}

// SentencePiece style: tokens <0x00>.. are bytes, a space is written as U+2581.
Json byte_fallback_json() {
  Json json = byte_level_json();
  Json pieces = Json::array();
  Json bytes = Json::array();
  for (int byte = 0; byte < 256; ++byte) {
    char text[8];
    std::snprintf(text, sizeof text, "<0x%02X>", static_cast<unsigned>(byte));
    pieces.push_back(text);
    bytes.push_back(byte);
  }
  for (const char* text : {"\u2581a", "a", "<end>", "<tool>", "\u2581"}) pieces.push_back(text);
  json["byte_level"] = false;
  json["pieces"] = pieces;
  json["byte_tokens"] = bytes;
  json["merges"] = {260, 257, 256};
  json["normalizers"] = {{{"kind", "prepend"}, {"text", "\u2581"}},
                         {{"kind", "replace"}, {"from", " "}, {"to", "\u2581"}}};
  json["decoder"]["byte_level"] = false;
  json["decoder"]["byte_fallback"] = true;
  json["decoder"]["replacements"] = Json::array({Json::array({"\u2581", " "})});
  json["decoder"]["strip"] = " ";
  json["decoder"]["strip_count"] = 1;
  return json;
}

std::unique_ptr<Tokenizer> load(const Json& json) {
  std::string error;
  auto tokenizer = Tokenizer::load(json.dump(), &error);
  EXPECT_TRUE(tokenizer) << error;
  return tokenizer;
}

std::vector<std::int32_t> encode(const Tokenizer& tokenizer, std::string_view text, bool parse_special = true,
                                 bool add_special = false) {
  std::string error;
  const auto ids = tokenizer.encode(text, parse_special, add_special, &error);
  EXPECT_TRUE(ids) << error;
  return ids.value_or(std::vector<std::int32_t>());
}

std::vector<std::int32_t> bytes(std::string_view text) {
  std::vector<std::int32_t> ids;
  for (const char c : text) ids.push_back(static_cast<unsigned char>(c));
  return ids;
}

using Ids = std::vector<std::int32_t>;

TEST(Tokenizer, MergesInOrderOfRank) {
  const auto tokenizer = load(byte_level_json());
  EXPECT_EQ(encode(*tokenizer, "hel"), Ids{kHello + 1});
  EXPECT_EQ(encode(*tokenizer, "hehe l"), (Ids{kHello, kHello, ' ', 'l'}));
  EXPECT_EQ(encode(*tokenizer, ""), Ids{});
  EXPECT_EQ(encode(*tokenizer, "", true, true), Ids{kEnd});
  EXPECT_EQ(encode(*tokenizer, "e\u0301"), bytes("\u00e9"));  // NFC
}

TEST(Tokenizer, SpecialTokensAreTextUnlessAskedFor) {
  const auto tokenizer = load(byte_level_json());
  EXPECT_EQ(encode(*tokenizer, "a<end><tool>"), (Ids{'a', kEnd, kTool}));
  Ids as_text = bytes("a<end>");
  as_text.push_back(kTool);
  EXPECT_EQ(encode(*tokenizer, "a<end><tool>", false), as_text);
  EXPECT_EQ(encode(*tokenizer, "<end"), bytes("<end"));
  EXPECT_TRUE(tokenizer->is_special(kEnd));
  EXPECT_FALSE(tokenizer->is_special(kTool));
  EXPECT_EQ(tokenizer->decode(Ids{'a', kEnd, 'b'}, true), "ab");
  EXPECT_EQ(tokenizer->decode(Ids{'a', kEnd, 'b'}, false), "a<end>b");
  EXPECT_EQ(tokenizer->bos_token_id(), kEnd);
  EXPECT_EQ(tokenizer->eos_token_id(), std::nullopt);
  EXPECT_EQ(tokenizer->token_id("<tool>"), kTool);
  EXPECT_EQ(tokenizer->token_id("hel"), kHello + 1);
  EXPECT_EQ(tokenizer->token_id("nothing"), std::nullopt);
}

TEST(Tokenizer, IdsOutsideTheVocabularyGiveNothing) {
  const auto tokenizer = load(byte_level_json());
  EXPECT_EQ(tokenizer->vocab_size(), kCount);
  for (const std::int32_t id : {-1, kHole, kCount, INT32_MAX, INT32_MIN}) {
    EXPECT_EQ(tokenizer->token_bytes(id), "");
    EXPECT_FALSE(tokenizer->is_special(id));
    EXPECT_EQ(tokenizer->decode(Ids{'x', id, 'y'}, true), "xy");
    StreamDecoder stream(*tokenizer);
    EXPECT_EQ(stream.feed(id) + stream.flush(), "");
  }
}

TEST(Tokenizer, InvalidUtf8IsRefused) {
  const auto tokenizer = load(byte_level_json());
  std::string error;
  EXPECT_FALSE(tokenizer->encode("ok\xff", true, false, &error));
  EXPECT_EQ(error, "The text is not valid UTF-8 at byte 2; give UTF-8 text.");
}

TEST(Tokenizer, SameIdsFromManyThreads) {
  const auto tokenizer = load(byte_level_json());
  std::vector<Ids> results(4);
  std::vector<std::thread> threads;
  for (Ids& result : results) {
    threads.emplace_back([&] {
      for (int i = 0; i < 300; ++i) {
        const Ids ids = encode(*tokenizer, "hello " + std::to_string(i) + "<end> hehel");
        result.insert(result.end(), ids.begin(), ids.end());
      }
    });
  }
  for (std::thread& thread : threads) thread.join();
  for (const Ids& result : results) EXPECT_EQ(result, results[0]);
}

TEST(StreamDecoder, HoldsACharacterUntilItIsComplete) {
  const auto tokenizer = load(byte_level_json());
  StreamDecoder stream(*tokenizer);
  EXPECT_EQ(stream.feed('a'), "a");
  const std::string smile = "\U0001f642";
  EXPECT_EQ(stream.feed(static_cast<unsigned char>(smile[0])), "");
  EXPECT_EQ(stream.feed(static_cast<unsigned char>(smile[1])), "");
  EXPECT_EQ(stream.feed(static_cast<unsigned char>(smile[2])), "");
  EXPECT_EQ(stream.feed(static_cast<unsigned char>(smile[3])), smile);
  EXPECT_EQ(stream.feed(kEnd), "");
  EXPECT_EQ(stream.feed(kHello + 1), "hel");
  EXPECT_EQ(stream.flush(), "");
}

TEST(StreamDecoder, BytesThatCannotBecomeACharacterAreReplaced) {
  const auto tokenizer = load(byte_level_json());
  StreamDecoder stream(*tokenizer);
  EXPECT_EQ(stream.feed(0xE6), "");
  EXPECT_EQ(stream.feed('x'), "\uFFFDx");
  EXPECT_EQ(stream.feed(0xFF), "\uFFFD");
  EXPECT_EQ(stream.feed(0xF0), "");
  EXPECT_EQ(stream.feed(0x9F), "");
  EXPECT_EQ(stream.flush(), "\uFFFD");
  EXPECT_EQ(stream.flush(), "");
  EXPECT_EQ(stream.feed('y'), "y");
}

TEST(StreamDecoder, EqualsDecodingAtOnceForAnyBytes) {
  const auto tokenizer = load(byte_level_json());
  std::uint32_t state = 1;
  for (int round = 0; round < 2000; ++round) {
    Ids ids;
    for (int i = 0; i < 12; ++i) {
      state = state * 1664525u + 1013904223u;
      // mostly lead and continuation bytes
      ids.push_back(static_cast<std::int32_t>(state % 5 == 0 ? state >> 24 : 0x80 + (state >> 25)));
    }
    StreamDecoder stream(*tokenizer);
    std::string text;
    for (const std::int32_t id : ids) {
      const std::string part = stream.feed(id);
      EXPECT_EQ(utf8_error(part), std::string_view::npos);
      text += part;
    }
    text += stream.flush();
    EXPECT_EQ(text, tokenizer->decode(ids, true));
  }
}

TEST(StreamDecoder, ByteFallbackAndTheLeadingSpace) {
  const auto tokenizer = load(byte_fallback_json());
  const Ids ids = encode(*tokenizer, "a a\u00e9");
  EXPECT_EQ(ids, (Ids{256, 256, 0xC3, 0xA9}));
  EXPECT_EQ(tokenizer->decode(ids, true), "a a\u00e9");
  StreamDecoder stream(*tokenizer);
  EXPECT_EQ(stream.feed(256), "a");
  EXPECT_EQ(stream.feed(256), " a");
  EXPECT_EQ(stream.feed(0xC3), "");
  EXPECT_EQ(stream.feed(0xA9), "\u00e9");
  EXPECT_EQ(stream.flush(), "");
  // HF shows a run of byte tokens that is no UTF-8 as one replacement for each byte
  EXPECT_EQ(tokenizer->decode(Ids{257, 0xC3, 0xA9, 0xC3}, true), "a\uFFFD\uFFFD\uFFFD");
}

TEST(Tokenizer, DamagedJsonGivesAMessage) {
  for (const char* json : {"", "{", "[]", "null", "{\"format\": \"hetcomp-tokenizer\"}"}) {
    std::string error;
    EXPECT_FALSE(Tokenizer::load(json, &error)) << json;
    EXPECT_TRUE(error.starts_with("The compiled tokenizer cannot be read: ")) << error;
  }
  const Json good = byte_level_json();
  for (const auto& [field, value] : good.items()) {
    Json json = good;
    json.erase(field);
    std::string error;
    EXPECT_FALSE(Tokenizer::load(json.dump(), &error)) << field;
  }
}

TEST(Utf8, MaximalIllFormedParts) {
  // Examples of the Unicode standard, table 3-8 and following.
  EXPECT_EQ(utf8_lossy("\xC0\xAF\xE0\x80\xBF\xF0\x81\x82\x41"),
            "\uFFFD\uFFFD\uFFFD\uFFFD\uFFFD\uFFFD\uFFFD\uFFFD\x41");
  EXPECT_EQ(utf8_lossy("\xE1\x80\xE2\xF0\x91\x92\xF1\xBF\x41"), "\uFFFD\uFFFD\uFFFD\uFFFD\x41");
  EXPECT_EQ(utf8_lossy("\xED\xA0\x80"), "\uFFFD\uFFFD\uFFFD");
  EXPECT_EQ(utf8_lossy("\xF4\x91\x92\x93"), "\uFFFD\uFFFD\uFFFD\uFFFD");
  EXPECT_EQ(utf8_error("\u00e9\u6f22\U0001f642"), std::string_view::npos);
}

}  // namespace
}  // namespace hetcomp
