// Ends a text before the first of several strings, which may arrive in pieces.
#pragma once

#include <string>
#include <string_view>
#include <vector>

namespace hetcomp {

class StopStrings {
 public:
  explicit StopStrings(std::vector<std::string> stops);  // throws Error for an empty string

  // The text that can no longer become a part of a stop string. After a match nothing comes any more.
  std::string feed(std::string_view text);
  bool matched() const { return matched_; }
  // What was held back, when the text has ended otherwise.
  std::string flush();

 private:
  std::vector<std::string> stops_;
  std::string held_;
  bool matched_ = false;
};

}  // namespace hetcomp
