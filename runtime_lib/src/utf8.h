// UTF-8 checking, decoding and normal forms.
#pragma once

#include <cstddef>
#include <string>
#include <string_view>

namespace hetcomp {

enum class NormalForm { kNfc, kNfd, kNfkc, kNfkd };

// The length in bytes (1..4) of the well-formed character that starts `text`. If there is none: 0, and *bad
// (if given) is the length of the maximal ill-formed part, which Unicode and Rust's from_utf8_lossy replace
// by one U+FFFD. *truncated (if given) tells whether more bytes could still complete that part.
std::size_t utf8_length(std::string_view text, std::size_t* bad = nullptr, bool* truncated = nullptr);

// Offset of the first byte that is not UTF-8, or npos.
std::size_t utf8_error(std::string_view text);

// Each maximal ill-formed part becomes one U+FFFD.
std::string utf8_lossy(std::string_view bytes);

char32_t utf8_code_point(std::string_view character);
void utf8_append(char32_t code_point, std::string* out);

// Offset of the character that ends at `end` (end > 0) of well-formed text.
std::size_t utf8_previous(std::string_view text, std::size_t end);

// Unicode White_Space, which is what `\s` and str.isspace-like rules of Rust mean.
bool is_unicode_space(char32_t code_point);

// `text` must be well-formed. Returns false on lack of memory.
bool normalize(std::string_view text, NormalForm form, std::string* out);

}  // namespace hetcomp
