#include "run_queue_wait.h"

#include <fcntl.h>
#include <unistd.h>

#include <algorithm>
#include <array>
#include <charconv>
#include <cstdint>
#include <string>
#include <string_view>

namespace hetcomp {

namespace {

// Without schedstat there is the number of times that a CPU was taken from the thread. A busy process takes
// it more than a hundred times a second and keeps it for milliseconds; kernel threads take it up to 40 times
// for 20 to 50 us. With this time for each, the former comes above LaneCount's limit and the latter stay
// below.
constexpr std::chrono::microseconds kWaitOfPreemption{500};
constexpr std::string_view kPreemptions = "\nnonvoluntary_ctxt_switches:";

// The number behind blanks at the begin of the text.
std::optional<std::int64_t> number(std::string_view text) {
  text.remove_prefix(std::min(text.find_first_not_of(" \t"), text.size()));
  std::int64_t value = 0;
  if (std::from_chars(text.data(), text.data() + text.size(), value).ec != std::errc()) return {};
  return value;
}

}  // namespace

RunQueueWait::~RunQueueWait() {
  if (file_ >= 0) close(file_);
}

bool RunQueueWait::follow_caller() {
  const int caller = gettid();
  if (caller == thread_) return false;
  thread_ = caller;
  if (file_ >= 0) close(file_);
  const std::string folder = "/proc/self/task/" + std::to_string(caller);
  file_ = open((folder + "/schedstat").c_str(), O_RDONLY | O_CLOEXEC);
  counts_ = file_ < 0;
  if (counts_) file_ = open((folder + "/status").c_str(), O_RDONLY | O_CLOEXEC);
  return true;
}

std::optional<std::chrono::nanoseconds> RunQueueWait::total() const {
  std::array<char, 4096> buffer;
  const ssize_t size = file_ < 0 ? -1 : pread(file_, buffer.data(), buffer.size(), 0);
  if (size <= 0) return {};
  const std::string_view text(buffer.data(), static_cast<std::size_t>(size));
  // schedstat: "time on a CPU, time on a run queue, number of turns", the times in nanoseconds
  // (Documentation/scheduler/sched-stats.rst of Linux).
  const std::size_t before = text.find(counts_ ? kPreemptions : " ");
  if (before == text.npos) return {};
  const auto found = number(text.substr(before + (counts_ ? kPreemptions.size() : 1)));
  if (!found) return {};
  return counts_ ? *found * kWaitOfPreemption : std::chrono::nanoseconds(*found);
}

}  // namespace hetcomp
