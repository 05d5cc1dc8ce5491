#include "template_text.h"

#include <utf8proc.h>

#include <algorithm>

#include "utf8.h"

namespace hetcomp::text {

namespace {

char32_t code_of(std::string_view character) { return utf8_code_point(character); }

// str.isspace also takes the four information separators.
bool space(std::string_view character) {
  const char32_t code = code_of(character);
  return is_unicode_space(code) || (code >= 0x1C && code <= 0x1F);
}

utf8proc_category_t category(std::string_view character) {
  return utf8proc_category(static_cast<utf8proc_int32_t>(code_of(character)));
}

bool letter(std::string_view character) {
  const auto kind = category(character);
  return kind >= UTF8PROC_CATEGORY_LU && kind <= UTF8PROC_CATEGORY_LO;
}

bool cased(std::string_view character) {
  const auto kind = category(character);
  return kind >= UTF8PROC_CATEGORY_LU && kind <= UTF8PROC_CATEGORY_LT;
}

void append_upper(std::string_view character, std::string* out) {
  utf8_append(static_cast<char32_t>(utf8proc_toupper(static_cast<utf8proc_int32_t>(code_of(character)))),
              out);
}

void append_lower(std::string_view character, std::string* out) {
  utf8_append(static_cast<char32_t>(utf8proc_tolower(static_cast<utf8proc_int32_t>(code_of(character)))),
              out);
}

template <typename Is>
bool all_of(std::string_view text, Is is) {
  const auto all = characters(text);
  return !all.empty() && std::all_of(all.begin(), all.end(), is);
}

std::vector<std::string> split_spaces(std::string_view text, std::int64_t limit) {
  std::vector<std::string> out;
  const auto all = characters(text);
  std::size_t i = 0;
  while (true) {
    while (i < all.size() && space(all[i])) ++i;
    if (i == all.size()) return out;
    const auto begin = static_cast<std::size_t>(all[i].data() - text.data());
    if (limit >= 0 && static_cast<std::int64_t>(out.size()) == limit) {
      out.emplace_back(text.substr(begin));
      return out;
    }
    while (i < all.size() && !space(all[i])) ++i;
    const std::size_t end =
        i < all.size() ? static_cast<std::size_t>(all[i].data() - text.data()) : text.size();
    out.emplace_back(text.substr(begin, end - begin));
  }
}

std::vector<std::string> split_spaces_right(std::string_view text, std::int64_t limit) {
  std::vector<std::string> out;
  const auto all = characters(text);
  std::size_t i = all.size();
  while (true) {
    while (i > 0 && space(all[i - 1])) --i;
    if (i == 0) break;
    const std::size_t end = static_cast<std::size_t>(all[i - 1].data() - text.data()) + all[i - 1].size();
    if (limit >= 0 && static_cast<std::int64_t>(out.size()) == limit) {
      out.emplace_back(text.substr(0, end));
      break;
    }
    while (i > 0 && !space(all[i - 1])) --i;
    const std::size_t begin = i > 0 ? static_cast<std::size_t>(all[i].data() - text.data()) : 0;
    out.emplace_back(text.substr(begin, end - begin));
  }
  std::reverse(out.begin(), out.end());
  return out;
}

}  // namespace

std::vector<std::string_view> characters(std::string_view text) {
  std::vector<std::string_view> out;
  for (std::size_t at = 0; at < text.size();) {
    const std::size_t size = std::max<std::size_t>(utf8_length(text.substr(at)), 1);
    out.push_back(text.substr(at, size));
    at += size;
  }
  return out;
}

std::string strip(std::string_view text, const std::optional<std::string>& characters_to_strip, Side side) {
  const auto all = characters(text);
  const auto set = characters_to_strip ? characters(*characters_to_strip) : std::vector<std::string_view>();
  const auto goes = [&](std::string_view character) {
    return characters_to_strip ? std::find(set.begin(), set.end(), character) != set.end() : space(character);
  };
  std::size_t begin = 0;
  std::size_t end = all.size();
  if (side != Side::kRight) {
    while (begin < end && goes(all[begin])) ++begin;
  }
  if (side != Side::kLeft) {
    while (end > begin && goes(all[end - 1])) --end;
  }
  std::string out;
  for (std::size_t i = begin; i < end; ++i) out += all[i];
  return out;
}

std::vector<std::string> split(std::string_view text, std::string_view separator, std::int64_t limit,
                               bool from_right) {
  if (separator.empty()) return from_right ? split_spaces_right(text, limit) : split_spaces(text, limit);
  std::vector<std::string> out;
  while (limit < 0 || static_cast<std::int64_t>(out.size()) < limit) {
    const std::size_t at = from_right ? text.rfind(separator) : text.find(separator);
    if (at == std::string_view::npos) break;
    if (from_right) {
      out.emplace_back(text.substr(at + separator.size()));
      text = text.substr(0, at);
    } else {
      out.emplace_back(text.substr(0, at));
      text = text.substr(at + separator.size());
    }
  }
  out.emplace_back(text);
  if (from_right) std::reverse(out.begin(), out.end());
  return out;
}

std::vector<std::string> split_lines(std::string_view text, bool keep_ends) {
  std::vector<std::string> out;
  const auto all = characters(text);
  std::string line;
  for (std::size_t i = 0; i < all.size(); ++i) {
    const char32_t code = code_of(all[i]);
    const bool ends = (code >= 0xA && code <= 0xD) || (code >= 0x1C && code <= 0x1E) || code == 0x85 ||
                      code == 0x2028 || code == 0x2029;
    if (!ends || keep_ends) line += all[i];
    if (!ends) continue;
    if (code == '\r' && i + 1 < all.size() && all[i + 1] == "\n") {
      ++i;
      if (keep_ends) line += '\n';
    }
    out.push_back(std::move(line));
    line.clear();
  }
  if (!line.empty()) out.push_back(std::move(line));
  return out;
}

std::string replace(std::string_view text, std::string_view from, std::string_view to, std::int64_t limit) {
  std::string out;
  if (from.empty()) {  // Python puts `to` before every character and at the end
    const auto all = characters(text);
    for (std::size_t i = 0; i <= all.size(); ++i) {
      if (limit < 0 || static_cast<std::int64_t>(i) < limit) out += to;
      if (i < all.size()) out += all[i];
    }
    return out;
  }
  for (std::int64_t done = 0; limit < 0 || done < limit; ++done) {
    const std::size_t at = text.find(from);
    if (at == std::string_view::npos) break;
    out += text.substr(0, at);
    out += to;
    text = text.substr(at + from.size());
  }
  out += text;
  return out;
}

std::string upper(std::string_view text) {
  std::string out;
  for (const auto character : characters(text)) append_upper(character, &out);
  return out;
}

std::string lower(std::string_view text) {
  std::string out;
  for (const auto character : characters(text)) append_lower(character, &out);
  return out;
}

std::string capitalize(std::string_view text) {
  std::string out;
  for (const auto character : characters(text))
    out.empty() ? append_upper(character, &out) : append_lower(character, &out);
  return out;
}

std::string title(std::string_view text) {
  std::string out;
  bool inside = false;
  for (const auto character : characters(text)) {
    inside ? append_lower(character, &out) : append_upper(character, &out);
    inside = cased(character);
  }
  return out;
}

std::string filter_title(std::string_view text) {
  std::string out;
  bool inside = false;
  for (const auto character : characters(text)) {
    // jinja2 starts a word behind any of these
    const bool border =
        space(character) || std::string_view("-({[<").find(character) != std::string_view::npos;
    inside ? append_lower(character, &out) : append_upper(character, &out);
    inside = !border;
  }
  return out;
}

bool is_space(std::string_view text) { return all_of(text, space); }

bool is_digit(std::string_view text) {
  return all_of(text, [](std::string_view c) { return category(c) == UTF8PROC_CATEGORY_ND; });
}

bool is_alpha(std::string_view text) { return all_of(text, letter); }

bool is_alnum(std::string_view text) {
  return all_of(text, [](std::string_view c) {
    const auto kind = category(c);
    return letter(c) || kind == UTF8PROC_CATEGORY_ND || kind == UTF8PROC_CATEGORY_NL ||
           kind == UTF8PROC_CATEGORY_NO;
  });
}

bool is_upper(std::string_view text) {
  const auto all = characters(text);
  return std::any_of(all.begin(), all.end(), cased) && std::none_of(all.begin(), all.end(), [](auto c) {
           return cased(c) && category(c) != UTF8PROC_CATEGORY_LU;
         });
}

bool is_lower(std::string_view text) {
  const auto all = characters(text);
  return std::any_of(all.begin(), all.end(), cased) && std::none_of(all.begin(), all.end(), [](auto c) {
           return cased(c) && category(c) != UTF8PROC_CATEGORY_LL;
         });
}

std::int64_t find(std::string_view text, std::string_view part, bool from_right) {
  const std::size_t at = from_right ? text.rfind(part) : text.find(part);
  if (at == std::string_view::npos) return -1;
  return static_cast<std::int64_t>(characters(text.substr(0, at)).size());
}

std::int64_t count(std::string_view text, std::string_view part) {
  if (part.empty()) return static_cast<std::int64_t>(characters(text).size()) + 1;
  std::int64_t found = 0;
  for (std::size_t at = text.find(part); at != std::string_view::npos; at = text.find(part, at + part.size()))
    ++found;
  return found;
}

}  // namespace hetcomp::text
