// Where the calling thread may run.
#pragma once

#include <sched.h>

#include <array>
#include <vector>

namespace hetcomp {

// The calling thread may run on these CPUs only. Those that were taken away meanwhile do not count; if none
// is left, or there are none, the thread stays where the scheduler puts it.
void bind_thread(const std::vector<int>& cpus);

// Moves the calling thread to this CPU, if it is elsewhere, and leaves it as free as it was.
void move_thread(int cpu);

// Binds the calling thread for as long as this lives; without CPUs it does nothing.
class BoundWhile {
 public:
  explicit BoundWhile(const std::vector<int>& cpus);
  ~BoundWhile();
  BoundWhile(const BoundWhile&) = delete;
  BoundWhile& operator=(const BoundWhile&) = delete;

 private:
  std::array<cpu_set_t, 8> before_;  // 8192 CPUs, the most that Linux is built for
  bool bound_ = false;
};

}  // namespace hetcomp
