// Text to token ids and back, from a compiled `tokenizer.hetc.json` (hetcomp/artifact/tokenizer.py writes
// it).
//
// The steps and their order are those of HF `tokenizers`: cut at added tokens, normalise, cut at added tokens
// that match normalised text, pre-tokenise, BPE on each piece. Equality of ids is proven when a model is
// compiled.
#pragma once

#include <cstdint>
#include <memory>
#include <optional>
#include <span>
#include <string>
#include <string_view>
#include <vector>

namespace hetcomp {

struct TokenizerModel;

// All const methods may be called from several threads at once. No exception leaves this class.
class Tokenizer {
 public:
  // Returns null and sets *error (one sentence) if `json` is not a compiled tokenizer.
  static std::unique_ptr<Tokenizer> load(std::string_view json, std::string* error);
  ~Tokenizer();
  Tokenizer(const Tokenizer&) = delete;
  Tokenizer& operator=(const Tokenizer&) = delete;

  // parse_special: special added tokens written in the text (such as <|im_end|>) become their ids; if false
  // they are text like any other. add_special: the ids that the model's post-processor puts around a text
  // (such as BOS). Returns nothing and sets *error if `utf8` is not valid UTF-8: what HF would see depends on
  // how its caller decoded the bytes, so there is no right answer to give.
  std::optional<std::vector<std::int32_t>> encode(std::string_view utf8, bool parse_special, bool add_special,
                                                  std::string* error) const;

  // The text of `ids` as HF's decode gives it; bytes that are not UTF-8 become U+FFFD. Ids outside the
  // vocabulary give nothing.
  std::string decode(std::span<const std::int32_t> ids, bool skip_special) const;

  // The raw bytes one token stands for; they may be a part of a UTF-8 character. Empty for ids outside the
  // vocabulary, and for special tokens if skip_special.
  std::string token_bytes(std::int32_t id, bool skip_special = false) const;

  // The id of a token by its text, added tokens first.
  std::optional<std::int32_t> token_id(std::string_view text) const;

  bool is_special(std::int32_t id) const;
  std::int32_t vocab_size() const;  // largest id + 1
  std::optional<std::int32_t> bos_token_id() const;
  std::optional<std::int32_t> eos_token_id() const;

 private:
  friend class StreamDecoder;
  explicit Tokenizer(std::unique_ptr<TokenizerModel> model);
  std::unique_ptr<TokenizerModel> model_;
};

// Turns ids into text one at a time and never hands out a part of a UTF-8 character. Not thread safe; the
// tokenizer must outlive it.
class StreamDecoder {
 public:
  explicit StreamDecoder(const Tokenizer& tokenizer, bool skip_special = true);

  // The text that has become complete with this token; empty while a character is still open. Bytes that can
  // no longer become a character give U+FFFD.
  std::string feed(std::int32_t id);

  // What is still held back, as U+FFFD if it is an incomplete character; the decoder is then as new.
  std::string flush();

 private:
  const Tokenizer& tokenizer_;
  bool skip_special_;
  bool at_start_ = true;
  std::string pending_;
};

}  // namespace hetcomp
