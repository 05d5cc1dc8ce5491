#include "cpu_affinity.h"

#include <pthread.h>

#include <algorithm>
#include <cstddef>
#include <memory>

namespace hetcomp {

void bind_thread(const std::vector<int>& cpus) {
  struct MaskFree {
    void operator()(cpu_set_t* mask) const { CPU_FREE(mask); }
  };
  if (cpus.empty()) return;
  const auto count = static_cast<std::size_t>(*std::max_element(cpus.begin(), cpus.end())) + 1;
  const std::unique_ptr<cpu_set_t, MaskFree> mask(CPU_ALLOC(count));
  if (!mask) return;
  CPU_ZERO_S(CPU_ALLOC_SIZE(count), mask.get());
  for (const int cpu : cpus) CPU_SET_S(static_cast<std::size_t>(cpu), CPU_ALLOC_SIZE(count), mask.get());
  pthread_setaffinity_np(pthread_self(), CPU_ALLOC_SIZE(count), mask.get());
}

BoundWhile::BoundWhile(const std::vector<int>& cpus) {
  if (cpus.empty()) return;
  bound_ = pthread_getaffinity_np(pthread_self(), sizeof(before_), before_.data()) == 0;
  if (bound_) bind_thread(cpus);
}

BoundWhile::~BoundWhile() {
  if (bound_) pthread_setaffinity_np(pthread_self(), sizeof(before_), before_.data());
}

void move_thread(int cpu) {
  if (sched_getcpu() != cpu) const BoundWhile there({cpu});
}

}  // namespace hetcomp
