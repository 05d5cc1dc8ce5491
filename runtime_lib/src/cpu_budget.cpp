#include "cpu_budget.h"

#include <sched.h>

#include <algorithm>
#include <cerrno>
#include <fstream>
#include <memory>
#include <set>
#include <string>

#include "cgroup.h"
#include "status.h"

namespace hetcomp {
namespace {

struct MaskFree {
  void operator()(cpu_set_t* mask) const { CPU_FREE(mask); }
};

// The affinity mask already contains the effect of cpusets. Grows until the kernel's mask fits.
std::vector<int> allowed_cpus() {
  for (int capacity = 1024; capacity <= (1 << 20); capacity *= 2) {
    const std::unique_ptr<cpu_set_t, MaskFree> mask(CPU_ALLOC(static_cast<std::size_t>(capacity)));
    const std::size_t bytes = CPU_ALLOC_SIZE(static_cast<std::size_t>(capacity));
    if (!mask) break;
    CPU_ZERO_S(bytes, mask.get());
    if (sched_getaffinity(0, bytes, mask.get()) != 0) {
      if (errno == EINVAL) continue;
      break;
    }
    std::vector<int> cpus;
    for (int cpu = 0; cpu < capacity; ++cpu)
      if (CPU_ISSET_S(static_cast<std::size_t>(cpu), bytes, mask.get())) cpus.push_back(cpu);
    return cpus;
  }
  return {0};
}

// The list of a core's hyperthreads names the core; without sysfs every CPU counts as one.
std::string core_of(int cpu) {
  std::ifstream in("/sys/devices/system/cpu/cpu" + std::to_string(cpu) + "/topology/thread_siblings_list");
  std::string siblings;
  if (std::getline(in, siblings) && !siblings.empty()) return siblings;
  return "cpu" + std::to_string(cpu);
}

}  // namespace

CpuBudget cpu_budget(int requested) {
  std::vector<int> cpus;
  std::vector<int> siblings;
  std::set<std::string> cores;
  for (const int cpu : allowed_cpus()) (cores.insert(core_of(cpu)).second ? cpus : siblings).push_back(cpu);
  CpuBudget budget{{}, cpus, static_cast<int>(cpus.size())};
  budget.order.insert(budget.order.end(), siblings.begin(), siblings.end());

  int threads = requested;
  if (requested == 0) {
    threads = budget.cores;
    // Rounded down: a thread above the quota gets all of them throttled at every barrier.
    if (const auto quota = cgroup_cpu_quota()) threads = std::clamp(static_cast<int>(*quota), 1, threads);
  }
  const auto allowed = static_cast<int>(budget.order.size());
  if (threads < 1 || threads > allowed) {
    throw Error(HETCOMP_INVALID_ARGUMENT, "Cannot run " + std::to_string(requested) +
                                              " threads: this process may use " + std::to_string(allowed) +
                                              " CPUs (threads 0 chooses by itself).");
  }
  budget.cpus.assign(budget.order.begin(), budget.order.begin() + threads);
  return budget;
}

}  // namespace hetcomp
