// Cuts normalised text into the pieces that BPE works on.
#pragma once

#include <nlohmann/json_fwd.hpp>
#include <string>
#include <string_view>
#include <variant>
#include <vector>

#include "unicode_regex.h"

namespace hetcomp {

enum class SplitBehavior { kRemoved, kIsolated, kMergedWithPrevious, kMergedWithNext, kContiguous };

// Cuts at the matches of a pattern. invert: what is between the matches counts as the match.
struct SplitStep {
  Regex regex;
  SplitBehavior behavior;
  bool invert;
};

// Puts a space before a piece that does not start with one (ByteLevel's add_prefix_space).
struct PrefixSpaceStep {};

// Writes spaces as `replacement`, puts one in front (scheme), and cuts before each one (split).
struct MetaspaceStep {
  enum class Scheme { kAlways, kFirst, kNever };
  std::string replacement;
  Scheme scheme;
  bool split;
};

using PretokenizerStep = std::variant<SplitStep, PrefixSpaceStep, MetaspaceStep>;

class Pretokenizer {
 public:
  Pretokenizer() = default;
  // `steps`: the array "pretokenizers" of a compiled tokenizer. Throws nlohmann::json::exception or
  // std::runtime_error.
  explicit Pretokenizer(const nlohmann::ordered_json& steps);

  // at_text_start: the piece is the first of the whole input. Throws std::runtime_error (see Regex::spans).
  std::vector<std::string> split(std::string_view piece, bool at_text_start) const;

 private:
  std::vector<PretokenizerStep> steps_;
};

}  // namespace hetcomp
