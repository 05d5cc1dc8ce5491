#include "stop_strings.h"

#include <algorithm>
#include <utility>

#include "status.h"

namespace hetcomp {
namespace {

// Length of the longest end of `text` that begins `stop` without being all of it.
std::size_t overlap(std::string_view text, std::string_view stop) {
  for (std::size_t n = std::min(text.size(), stop.size() - 1); n > 0; --n)
    if (text.ends_with(stop.substr(0, n))) return n;
  return 0;
}

}  // namespace

StopStrings::StopStrings(std::vector<std::string> stops) : stops_(std::move(stops)) {
  for (const std::string& stop : stops_)
    if (stop.empty())
      throw Error(HETCOMP_INVALID_ARGUMENT, "A stop string is empty: it would stop every text.");
}

std::string StopStrings::feed(std::string_view text) {
  if (matched_) return {};
  held_ += text;
  std::size_t end = std::string::npos;
  std::size_t open = 0;
  for (const std::string& stop : stops_) {
    end = std::min(end, held_.find(stop));
    open = std::max(open, overlap(held_, stop));
  }
  matched_ = end != std::string::npos;
  std::string ready = held_.substr(0, matched_ ? end : held_.size() - open);
  held_.erase(0, matched_ ? held_.size() : ready.size());
  return ready;
}

std::string StopStrings::flush() { return std::exchange(held_, {}); }

}  // namespace hetcomp
