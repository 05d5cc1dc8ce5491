// Python's string methods on UTF-8. Case mapping is one code point to one code point (so "ß".upper() stays
// "ß"); templates change the case of role names and the like, which are ASCII.
#pragma once

#include <cstdint>
#include <optional>
#include <string>
#include <string_view>
#include <vector>

namespace hetcomp::text {

enum class Side { kBoth, kLeft, kRight };

// Without `characters`: white space as str.isspace has it.
std::string strip(std::string_view text, const std::optional<std::string>& characters, Side side);
// separator empty: runs of white space. limit < 0: no limit. from_right: rsplit.
std::vector<std::string> split(std::string_view text, std::string_view separator, std::int64_t limit,
                               bool from_right);
std::vector<std::string> split_lines(std::string_view text, bool keep_ends);
std::string replace(std::string_view text, std::string_view from, std::string_view to, std::int64_t limit);
std::string upper(std::string_view text);
std::string lower(std::string_view text);
std::string capitalize(std::string_view text);
std::string title(std::string_view text);         // str.title()
std::string filter_title(std::string_view text);  // jinja2's filter "title"
bool is_space(std::string_view text);
bool is_digit(std::string_view text);
bool is_alpha(std::string_view text);
bool is_alnum(std::string_view text);
bool is_upper(std::string_view text);
bool is_lower(std::string_view text);
// Code point offsets; -1 if absent.
std::int64_t find(std::string_view text, std::string_view part, bool from_right);
std::int64_t count(std::string_view text, std::string_view part);
std::vector<std::string_view> characters(std::string_view text);

}  // namespace hetcomp::text
