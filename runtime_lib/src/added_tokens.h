// Finds added tokens (such as <|im_end|>) in text before anything else looks at it.
#pragma once

#include <array>
#include <cstdint>
#include <optional>
#include <string>
#include <string_view>
#include <unordered_map>
#include <utility>
#include <vector>

#include "unicode_regex.h"

namespace hetcomp {

struct AddedToken {
  std::int32_t id;
  std::string text;  // what is matched; already normalised if `normalized`
  bool special;      // not matched when the caller wants special tokens read as text
  bool normalized;   // matched in the normalised text rather than in the raw one
  bool lstrip;       // takes the white space before it too
  bool rstrip;       // takes the white space behind it too
  bool single_word;  // only where no word character touches it
};

// A stretch of the input: an added token, or text (no id) that is still to be tokenised.
struct Stretch {
  std::string_view text;
  std::size_t offset;
  std::optional<std::int32_t> id;
};

// Leftmost match first, longest among those that start together, as in HF.
class AddedTokenMatcher {
 public:
  AddedTokenMatcher() = default;
  // word: a pattern for one word character; needed if any token is single_word.
  AddedTokenMatcher(std::vector<AddedToken> tokens, const std::optional<std::string>& word);

  // Thread safe. The views point into `text`.
  std::vector<Stretch> cut(std::string_view text, bool match_special) const;

 private:
  const AddedToken* longest_at(std::string_view text, std::size_t at) const;
  bool touches_word(std::string_view text, std::size_t begin, std::size_t end) const;

  std::vector<AddedToken> tokens_;
  std::array<bool, 256> starts_{};
  // Trie: (node << 8 | byte) -> node; node -> index into tokens_.
  std::unordered_map<std::uint64_t, std::uint32_t> edges_;
  std::unordered_map<std::uint32_t, std::size_t> ends_;
  std::optional<Regex> word_;
};

}  // namespace hetcomp
