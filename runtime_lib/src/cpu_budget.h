// How many threads this process should compute with, and on which CPUs.
#pragma once

#include <vector>

namespace hetcomp {

struct CpuBudget {
  std::vector<int> cpus;   // one for each lane, the first of `order`
  std::vector<int> order;  // the affinity mask: different physical cores first, then their other hyperthreads
  int cores;               // physical cores: so many of `order`
};

// requested 0: the allowed physical cores, but no more than the cgroup's CPU quota. Throws Error for a
// request beyond the allowed CPUs, where lanes would wait for each other.
CpuBudget cpu_budget(int requested);

}  // namespace hetcomp
