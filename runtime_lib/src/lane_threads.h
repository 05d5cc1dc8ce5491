// The threads that execute a program: the calling thread is lane 0, the others wait for steps.
#pragma once

#include <atomic>
#include <chrono>
#include <cstdint>
#include <memory>
#include <thread>
#include <vector>

#include "hetcomp/lane.h"
#include "hetcomp/program.h"
#include "lane_count.h"
#include "run_queue_wait.h"

namespace hetcomp {

// The lanes of one NUMA node that a program is cut for.
struct LaneGroup {
  int threads;
  std::vector<int> cpus;  // where they may run
};

// Not thread safe: one step at a time.
class LaneThreads {
 public:
  // One group for each of the program's nodes; a group may be empty, all of them together not. The threads
  // this class starts may run on their group's CPUs and nowhere else, each on one of its own while nobody
  // else wants them; the caller, who is lane 0, is bound to its group's for the length of a step where the
  // groups' CPUs differ.
  explicit LaneThreads(const std::vector<LaneGroup>& groups);
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
    RunQueueWait wait;
    std::chrono::nanoseconds waited{0};  // wait.total() at the last decision
  };
  // Where a lane works on what is cut over nodes: see Lane.
  struct Seat {
    LaneSet* set = nullptr;
    int thread = 0;
    int first_node = 0;
    int last_node = 1;
  };
  // What a number of lanes share in a step.
  struct Team {
    Team(const std::vector<int>& nodes, int n_nodes);
    void begin(std::int32_t spins, bool quiet);
    std::int32_t error() const;

    LaneSet all;
    std::vector<std::unique_ptr<LaneSet>> own;
    std::vector<Seat> seats;  // of each lane
  };
  LaneThreads(const std::vector<LaneGroup>& groups, const std::vector<int>& nodes);
  void work(int thread, const std::vector<int>& cpus);
  void run_lane(int thread);
  void begin_step(Place& place);
  double longest_wait(std::size_t active);
  void shut_down();

  std::vector<Place> places_;
  std::vector<std::unique_ptr<Team>> teams_;  // teams_[n - 1]: of n lanes
  std::vector<int> callers_cpus_;             // of lane 0 in a step; empty: anywhere
  std::vector<int> own_cpus_;                 // of every lane while it is quiet; empty: there are too few
  bool spread_ = false;                       // in this step every lane is to have its own CPU
  LaneCount count_;
  std::chrono::nanoseconds since_decision_{0};  // time of the steps
  const std::int32_t quiet_spins_;              // iterations of pause, see LaneSet::spin_iterations
  const std::int32_t hand_over_spins_;
  const std::int32_t contended_spins_;
  Team* team_ = nullptr;
  const hetcomp_program* program_ = nullptr;
  const hetcomp_step* step_ = nullptr;
  alignas(64) std::atomic<std::uint32_t> running_{0};  // workers still inside the step
  std::atomic<std::int32_t> waiting_spins_;            // of a worker between two steps
  std::atomic<bool> stop_{false};
  std::vector<std::thread> workers_;
};

}  // namespace hetcomp
