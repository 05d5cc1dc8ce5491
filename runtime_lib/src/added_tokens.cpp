#include "added_tokens.h"

#include <algorithm>
#include <stdexcept>

#include "utf8.h"

namespace hetcomp {

namespace {

std::size_t spaces_begin(std::string_view text, std::size_t end) {
  while (end > 0) {
    const std::size_t at = utf8_previous(text, end);
    if (!is_unicode_space(utf8_code_point(text.substr(at, end - at)))) break;
    end = at;
  }
  return end;
}

std::size_t spaces_end(std::string_view text, std::size_t begin) {
  while (begin < text.size()) {
    const std::size_t length = utf8_length(text.substr(begin));
    if (!is_unicode_space(utf8_code_point(text.substr(begin, length)))) break;
    begin += length;
  }
  return begin;
}

}  // namespace

AddedTokenMatcher::AddedTokenMatcher(std::vector<AddedToken> tokens, const std::optional<std::string>& word)
    : tokens_(std::move(tokens)) {
  if (word) word_.emplace(*word);
  std::uint32_t nodes = 1;
  for (std::size_t i = 0; i < tokens_.size(); ++i) {
    const std::string& text = tokens_[i].text;
    if (text.empty()) throw std::runtime_error("an added token is empty");
    if (tokens_[i].single_word && !word_)
      throw std::runtime_error("a single_word token without a word pattern");
    starts_[static_cast<unsigned char>(text[0])] = true;
    std::uint32_t node = 0;
    for (const char c : text) {
      const auto [edge, fresh] =
          edges_.try_emplace(std::uint64_t{node} << 8 | static_cast<unsigned char>(c), nodes);
      if (fresh) ++nodes;
      node = edge->second;
    }
    ends_.try_emplace(node, i);
  }
}

const AddedToken* AddedTokenMatcher::longest_at(std::string_view text, std::size_t at) const {
  const AddedToken* found = nullptr;
  std::uint32_t node = 0;
  for (; at < text.size(); ++at) {
    const auto edge = edges_.find(std::uint64_t{node} << 8 | static_cast<unsigned char>(text[at]));
    if (edge == edges_.end()) break;
    node = edge->second;
    const auto end = ends_.find(node);
    if (end != ends_.end()) found = &tokens_[end->second];
  }
  return found;
}

bool AddedTokenMatcher::touches_word(std::string_view text, std::size_t begin, std::size_t end) const {
  if (begin > 0) {
    const std::size_t at = utf8_previous(text, begin);
    if (!word_->spans(text.substr(at, begin - at)).empty()) return true;
  }
  if (end < text.size()) {
    const std::size_t length = utf8_length(text.substr(end));
    if (!word_->spans(text.substr(end, length)).empty()) return true;
  }
  return false;
}

std::vector<Stretch> AddedTokenMatcher::cut(std::string_view text, bool match_special) const {
  std::vector<Stretch> out;
  std::size_t done = 0;
  std::size_t at = 0;
  while (at < text.size()) {
    const AddedToken* token = starts_[static_cast<unsigned char>(text[at])] ? longest_at(text, at) : nullptr;
    if (!token) {
      ++at;
      continue;
    }
    std::size_t begin = at;
    std::size_t end = at + token->text.size();
    // A match that is then discarded still hides what it covers, as in HF.
    at = end;
    if (token->special && !match_special) continue;
    if (token->single_word && touches_word(text, begin, end)) continue;
    if (token->lstrip) begin = std::max(spaces_begin(text, begin), done);
    if (token->rstrip) end = spaces_end(text, end);
    if (done < begin) out.push_back({text.substr(done, begin - done), done, std::nullopt});
    out.push_back({text.substr(begin, end - begin), begin, token->id});
    done = end;
  }
  if (done < text.size()) out.push_back({text.substr(done), done, std::nullopt});
  return out;
}

}  // namespace hetcomp
