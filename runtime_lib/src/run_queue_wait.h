// How long a thread was ready to run without a CPU.
#pragma once

#include <chrono>
#include <optional>

namespace hetcomp {

// Of one thread, readable from any other.
class RunQueueWait {
 public:
  RunQueueWait() = default;
  ~RunQueueWait();
  RunQueueWait(const RunQueueWait&) = delete;
  RunQueueWait& operator=(const RunQueueWait&) = delete;

  // From now on of the calling thread; false if it already was.
  bool follow_caller();

  // Since the thread began, estimated from the number of its preemptions where the kernel keeps no times;
  // nothing where /proc has neither.
  std::optional<std::chrono::nanoseconds> total() const;

 private:
  int thread_ = 0;
  int file_ = -1;        // what /proc says of it
  bool counts_ = false;  // that is the number of preemptions only
};

}  // namespace hetcomp
