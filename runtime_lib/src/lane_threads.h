// The threads that execute a program: the calling thread is lane 0, the others wait for steps.
#pragma once

#include <atomic>
#include <cstdint>
#include <thread>
#include <vector>

#include "hetcomp/lane.h"
#include "hetcomp/program.h"

namespace hetcomp {

// Not thread safe: one step at a time.
class LaneThreads {
 public:
  // One lane for each entry of `cpus`; the threads this class starts are bound to theirs.
  explicit LaneThreads(const std::vector<int>& cpus);
  ~LaneThreads();
  LaneThreads(const LaneThreads&) = delete;
  LaneThreads& operator=(const LaneThreads&) = delete;

  int size() const { return lanes_.n_threads; }

  // Runs one step on all lanes and returns the kernels' first error (0: none).
  std::int32_t run(const hetcomp_program& program, const hetcomp_step& step);

 private:
  void work(int thread);
  void shut_down();

  LaneSet lanes_;
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
