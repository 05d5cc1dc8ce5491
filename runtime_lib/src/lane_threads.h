// The threads that execute a program: the calling thread is lane 0, the others wait for steps.
#pragma once

#include <atomic>
#include <cstdint>
#include <memory>
#include <thread>
#include <vector>

#include "hetcomp/lane.h"
#include "hetcomp/program.h"
#include "lane_count.h"

namespace hetcomp {

// Not thread safe: one step at a time.
class LaneThreads {
 public:
  // One lane for each entry of `cpus`. The threads this class starts may run on any of them, but nowhere
  // else.
  explicit LaneThreads(const std::vector<int>& cpus);
  ~LaneThreads();
  LaneThreads(const LaneThreads&) = delete;
  LaneThreads& operator=(const LaneThreads&) = delete;

  int size() const { return static_cast<int>(places_.size()); }

  // Runs one step and returns the kernels' first error (0: none). All lanes take part, or fewer while other
  // processes take their cores (see LaneCount).
  std::int32_t run(const hetcomp_program& program, const hetcomp_step& step);

 private:
  // What a lane and lane 0 tell each other, on a cache line of its own.
  struct alignas(64) Place {
    std::atomic<std::uint32_t> begun{0};  // steps begun for this lane; it waits for a change
    std::atomic<std::uint32_t> sleeping{0};
    std::atomic<std::int64_t> preemptions{0};  // in its last step
  };
  void work(int thread);
  void run_lane(int thread);
  void begin_step(Place& place);
  void shut_down();

  std::vector<Place> places_;
  std::vector<std::unique_ptr<LaneSet>> sets_;  // sets_[n - 1]: the state shared by n lanes
  LaneCount count_;
  const std::int32_t quiet_spins_;  // iterations of pause, see LaneSet::spin_iterations
  const std::int32_t contended_spins_;
  LaneSet* set_ = nullptr;
  const hetcomp_program* program_ = nullptr;
  const hetcomp_step* step_ = nullptr;
  alignas(64) std::atomic<std::uint32_t> running_{0};  // workers still inside the step
  std::atomic<std::int32_t> waiting_spins_;            // of a worker between two steps
  std::atomic<bool> stop_{false};
  std::vector<std::thread> workers_;
};

}  // namespace hetcomp
