// The threads that execute a program: the calling thread is lane 0, the others wait for steps.
#pragma once

#include <atomic>
#include <chrono>
#include <cstdint>
#include <thread>
#include <vector>

#include "hetcomp/lane.h"
#include "hetcomp/program.h"

namespace hetcomp {

// Tells from the involuntary context switches of the lanes whether other processes want their cores.
class ContentionGauge {
 public:
  // preemptions: of all lanes in a step of that length.
  void add(std::int64_t preemptions, std::chrono::nanoseconds step);
  bool contended() const { return contended_; }

 private:
  std::int64_t preemptions_ = 0;
  std::chrono::nanoseconds observed_{0};
  bool contended_ = false;
};

// Not thread safe: one step at a time.
class LaneThreads {
 public:
  // One lane for each entry of `cpus`. The threads this class starts may run on any of them, but nowhere
  // else.
  explicit LaneThreads(const std::vector<int>& cpus);
  ~LaneThreads();
  LaneThreads(const LaneThreads&) = delete;
  LaneThreads& operator=(const LaneThreads&) = delete;

  int size() const { return lanes_.n_threads; }

  // Runs one step on all lanes and returns the kernels' first error (0: none).
  std::int32_t run(const hetcomp_program& program, const hetcomp_step& step);

 private:
  // What a lane reports about the last step; on a cache line of its own.
  struct alignas(64) Report {
    std::atomic<std::int64_t> preemptions{0};
  };
  void work(int thread);
  void run_lane(int thread);
  void shut_down();

  LaneSet lanes_;
  const std::int32_t quiet_spins_;  // iterations of pause, see LaneSet::spin_iterations
  const std::int32_t contended_spins_;
  std::vector<Report> reports_;
  ContentionGauge gauge_;
  const hetcomp_program* program_ = nullptr;
  const hetcomp_step* step_ = nullptr;
  // Steps begun so far; workers wait for it to change.
  alignas(64) std::atomic<std::uint32_t> begun_{0};
  alignas(64) std::atomic<std::uint32_t> running_{0};  // workers still inside the step
  alignas(64) std::atomic<std::uint32_t> sleeping_{0};
  std::atomic<bool> stop_{false};
  std::vector<std::thread> workers_;
};

}  // namespace hetcomp
