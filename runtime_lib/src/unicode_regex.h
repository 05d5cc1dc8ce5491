// One compiled PCRE2 pattern over UTF-8.
#pragma once

#include <cstddef>
#include <memory>
#include <string>
#include <string_view>
#include <utility>
#include <vector>

namespace hetcomp {

// Thread safe. Throws std::runtime_error (compile: bad pattern; spans: resources exhausted).
class Regex {
 public:
  explicit Regex(const std::string& pattern);
  ~Regex();
  Regex(Regex&&) noexcept;
  Regex& operator=(Regex&&) noexcept;

  // All non-overlapping matches of well-formed text as [begin, end) byte offsets, found as the `onig` crate
  // that HF uses finds them: an empty match right behind the last match is skipped.
  std::vector<std::pair<std::size_t, std::size_t>> spans(std::string_view text) const;

 private:
  struct Code;
  std::unique_ptr<Code> code_;
};

}  // namespace hetcomp
