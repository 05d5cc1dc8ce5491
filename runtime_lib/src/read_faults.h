// Reads of mapped files that fail: the disk reports an error, or the file was cut behind the mapping's back.
//
// The kernel tells by SIGBUS, on the thread that touched the page. While any file is watched, a handler of
// this process puts zeros in the place of that file and notes where it was touched, so that whoever reads
// goes on, and finds out afterwards that what was read is void. See docs/decisions/read-errors.md.
#pragma once

#include <atomic>
#include <csignal>
#include <cstddef>
#include <cstdint>
#include <memory>
#include <optional>
#include <span>

namespace hetcomp {

// As long as it lives, reads within the mapping that fail find zeros. Any thread may read; one thread at a
// time calls the rest.
class WatchedMapping {
 public:
  // mapping: of a file, from a page on, read-only.
  explicit WatchedMapping(std::span<const std::uint8_t> mapping);
  ~WatchedMapping();
  WatchedMapping(const WatchedMapping&) = delete;
  WatchedMapping& operator=(const WatchedMapping&) = delete;

  // Offset of the first byte whose read failed; none: what was read so far is what the file has. After a
  // failure the whole mapping is zeros, until somebody maps the file in its place again and calls forget().
  std::optional<std::uint64_t> fault() const;
  void forget();

 private:
  static constexpr std::int64_t kNone = -1;

  std::span<const std::uint8_t> mapping_;
  std::atomic<std::int64_t> fault_{kNone};
};

// While it lives, SIGBUS reaches its handler on this thread: where a thread has it blocked, the kernel ends
// the process instead.
class BusErrorsUnblocked {
 public:
  BusErrorsUnblocked();
  ~BusErrorsUnblocked();
  BusErrorsUnblocked(const BusErrorsUnblocked&) = delete;
  BusErrorsUnblocked& operator=(const BusErrorsUnblocked&) = delete;

 private:
  sigset_t before_;
};

}  // namespace hetcomp
