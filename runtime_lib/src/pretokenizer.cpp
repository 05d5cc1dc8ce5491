#include "pretokenizer.h"

#include <algorithm>
#include <cstddef>
#include <nlohmann/json.hpp>
#include <stdexcept>
#include <utility>

namespace hetcomp {

namespace {

struct Part {
  std::size_t begin;
  std::size_t end;
  bool match;
};

// The text cut at the matches; the parts cover it without gaps.
std::vector<Part> parts_of(std::string_view text, const SplitStep& step) {
  std::vector<Part> parts;
  std::size_t at = 0;
  for (const auto& [begin, end] : step.regex.spans(text)) {
    if (begin != at) parts.push_back({at, begin, step.invert});
    parts.push_back({begin, end, !step.invert});
    at = end;
  }
  if (at != text.size()) parts.push_back({at, text.size(), step.invert});
  return parts;
}

std::vector<Part> contiguous(const std::vector<Part>& parts) {
  std::vector<Part> out;
  for (const Part& part : parts) {
    if (!out.empty() && out.back().match == part.match) {
      out.back().end = part.end;
    } else {
      out.push_back(part);
    }
  }
  return out;
}

// A match joins the part before it unless that part is a match too.
std::vector<Part> merged_with_previous(const std::vector<Part>& parts) {
  std::vector<Part> out;
  bool previous = false;
  for (const Part& part : parts) {
    if (part.match && !previous && !out.empty()) {
      out.back().end = part.end;
    } else {
      out.push_back(part);
    }
    previous = part.match;
  }
  return out;
}

std::vector<Part> merged_with_next(const std::vector<Part>& parts) {
  std::vector<Part> out;
  bool previous = false;
  for (auto part = parts.rbegin(); part != parts.rend(); ++part) {
    if (part->match && !previous && !out.empty()) {
      out.back().begin = part->begin;
    } else {
      out.push_back(*part);
    }
    previous = part->match;
  }
  std::reverse(out.begin(), out.end());
  return out;
}

void apply(const SplitStep& step, std::string_view piece, bool, std::vector<std::string>* out) {
  std::vector<Part> parts = parts_of(piece, step);
  switch (step.behavior) {
    case SplitBehavior::kRemoved:
      std::erase_if(parts, [](const Part& part) { return part.match; });
      break;
    case SplitBehavior::kIsolated:
      break;
    case SplitBehavior::kMergedWithPrevious:
      parts = merged_with_previous(parts);
      break;
    case SplitBehavior::kMergedWithNext:
      parts = merged_with_next(parts);
      break;
    case SplitBehavior::kContiguous:
      parts = contiguous(parts);
      break;
  }
  for (const Part& part : parts) {
    if (part.end > part.begin) out->emplace_back(piece.substr(part.begin, part.end - part.begin));
  }
}

void apply(const PrefixSpaceStep&, std::string_view piece, bool, std::vector<std::string>* out) {
  out->push_back(piece.starts_with(' ') ? std::string(piece) : " " + std::string(piece));
}

void apply(const MetaspaceStep& step, std::string_view piece, bool at_start, std::vector<std::string>* out) {
  std::string text;
  for (const char c : piece) {
    if (c == ' ') {
      text += step.replacement;
    } else {
      text += c;
    }
  }
  const bool prefix = step.scheme == MetaspaceStep::Scheme::kAlways ||
                      (step.scheme == MetaspaceStep::Scheme::kFirst && at_start);
  if (prefix && !text.starts_with(step.replacement)) text.insert(0, step.replacement);
  if (!step.split) {
    out->push_back(std::move(text));
    return;
  }
  // Metaspace cuts as MergedWithNext does: in a run of replacements each but the last stands alone.
  std::size_t begin = 0;
  while (begin < text.size()) {
    const std::size_t next = text.find(step.replacement, begin + 1);
    out->push_back(text.substr(begin, next == std::string::npos ? next : next - begin));
    begin = next == std::string::npos ? text.size() : next;
  }
}

SplitBehavior behavior_of(const std::string& name) {
  if (name == "removed") return SplitBehavior::kRemoved;
  if (name == "isolated") return SplitBehavior::kIsolated;
  if (name == "merged_with_previous") return SplitBehavior::kMergedWithPrevious;
  if (name == "merged_with_next") return SplitBehavior::kMergedWithNext;
  if (name == "contiguous") return SplitBehavior::kContiguous;
  throw std::runtime_error("unknown split behavior '" + name + "'");
}

MetaspaceStep::Scheme scheme_of(const std::string& name) {
  if (name == "always") return MetaspaceStep::Scheme::kAlways;
  if (name == "first") return MetaspaceStep::Scheme::kFirst;
  if (name == "never") return MetaspaceStep::Scheme::kNever;
  throw std::runtime_error("unknown metaspace scheme '" + name + "'");
}

}  // namespace

Pretokenizer::Pretokenizer(const nlohmann::ordered_json& steps) {
  for (const auto& step : steps) {
    const auto kind = step.at("kind").get<std::string>();
    if (kind == "split") {
      steps_.emplace_back(SplitStep{Regex(step.at("regex").get<std::string>()),
                                    behavior_of(step.at("behavior").get<std::string>()),
                                    step.at("invert").get<bool>()});
    } else if (kind == "prefix_space") {
      steps_.emplace_back(PrefixSpaceStep{});
    } else if (kind == "metaspace") {
      auto replacement = step.at("replacement").get<std::string>();
      if (replacement.empty()) throw std::runtime_error("the metaspace replacement is empty");
      steps_.emplace_back(MetaspaceStep{std::move(replacement),
                                        scheme_of(step.at("scheme").get<std::string>()),
                                        step.at("split").get<bool>()});
    } else {
      throw std::runtime_error("unknown pre-tokenizer kind '" + kind + "'");
    }
  }
}

std::vector<std::string> Pretokenizer::split(std::string_view piece, bool at_text_start) const {
  std::vector<std::string> pieces;
  if (!piece.empty()) pieces.emplace_back(piece);
  for (const PretokenizerStep& step : steps_) {
    std::vector<std::string> next;
    for (std::size_t i = 0; i < pieces.size(); ++i) {
      std::visit([&](const auto& kind) { apply(kind, pieces[i], at_text_start && i == 0, &next); }, step);
    }
    pieces = std::move(next);
  }
  return pieces;
}

}  // namespace hetcomp
