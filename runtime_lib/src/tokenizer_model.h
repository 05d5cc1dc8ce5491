// The parts of a tokenizer as read from its compiled JSON. Internal to tokenizer*.cpp.
#pragma once

#include <cstdint>
#include <memory>
#include <optional>
#include <string>
#include <string_view>
#include <unordered_map>
#include <utility>
#include <vector>

#include "added_tokens.h"
#include "bpe.h"
#include "pretokenizer.h"
#include "utf8.h"

namespace hetcomp {

struct NormalizerStep {
  enum class Kind { kForm, kPrepend, kReplace };
  Kind kind;
  NormalForm form;
  std::string from;
  std::string to;  // also what kPrepend puts in front
};

struct Decoder {
  bool byte_level = false;
  // Tokens <0xNN> are bytes; HF shows each byte of a run that is not UTF-8 as one U+FFFD.
  bool byte_fallback = false;
  std::vector<std::pair<std::string, std::string>> replacements;
  std::string strip;  // one character taken from the start of the text, up to strip_count times
  int strip_count = 0;
  std::string metaspace;  // if set: a space, but nothing at all in the first token when drop_first
  bool drop_first = false;
};

struct Piece {
  std::string bytes;  // text of the token after the decoder's replacements
  bool exists = false;
  bool special = false;
  std::optional<unsigned char> byte;  // a <0xNN> token under byte_fallback
};

struct TokenizerModel {
  std::vector<Piece> pieces;
  std::vector<std::string>
      first_pieces;  // only with Decoder::drop_first: the text of a token that comes first
  std::unordered_map<std::string, std::int32_t> added_ids;
  AddedTokenMatcher raw_added;
  AddedTokenMatcher normalized_added;
  std::vector<NormalizerStep> normalizers;
  Pretokenizer pretokenizer;
  std::optional<Bpe> bpe;
  Decoder decoder;
  std::vector<std::int32_t> prefix;
  std::vector<std::int32_t> suffix;
  std::optional<std::int32_t> bos;
  std::optional<std::int32_t> eos;
};

// Throws std::runtime_error if memory runs out.
std::string apply_normalizers(const std::vector<NormalizerStep>& steps, std::string_view text);

// Throws nlohmann::json::exception or std::runtime_error.
std::unique_ptr<TokenizerModel> read_tokenizer_model(std::string_view json);

}  // namespace hetcomp
