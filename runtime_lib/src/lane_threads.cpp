#include "lane_threads.h"

#include <pthread.h>
#include <sched.h>

#include <algorithm>
#include <chrono>
#include <csignal>
#include <cstdlib>
#include <memory>

namespace hetcomp {
namespace {

// How long a lane spins before it parks. Between two ops the others arrive within this time when nobody disturbs
// them; beyond it, a core that another process wants is better given away. Measured in benchmarks/busy_desktop.
constexpr std::chrono::nanoseconds kSpin{20'000};

std::int32_t spin_iterations() {
  constexpr int kProbes = 1000;
  const auto start = std::chrono::steady_clock::now();
  for (int i = 0; i < kProbes; ++i) cpu_relax();
  const auto each = (std::chrono::steady_clock::now() - start) / static_cast<double>(kProbes);
  const double iterations = static_cast<double>(kSpin.count()) / std::max(each.count(), 1.0);
  return static_cast<std::int32_t>(iterations);
}

// Waits while `word` has the value `old`.
void wait_change(std::atomic<std::uint32_t>& word, std::uint32_t old, std::atomic<std::uint32_t>& sleeping,
                 std::int32_t spins) {
  while (word.load(std::memory_order_acquire) == old) {
    if (spins-- > 0) {
      cpu_relax();
      continue;
    }
    sleeping.fetch_add(1, std::memory_order_seq_cst);
    futex_wait(word, old);
    sleeping.fetch_sub(1, std::memory_order_relaxed);
  }
}

void bind_to(int cpu) {
  struct MaskFree {
    void operator()(cpu_set_t* mask) const { CPU_FREE(mask); }
  };
  const auto count = static_cast<std::size_t>(cpu) + 1;
  const std::unique_ptr<cpu_set_t, MaskFree> mask(CPU_ALLOC(count));
  if (!mask) return;
  CPU_ZERO_S(CPU_ALLOC_SIZE(count), mask.get());
  CPU_SET_S(static_cast<std::size_t>(cpu), CPU_ALLOC_SIZE(count), mask.get());
  // A CPU that was taken away meanwhile leaves the thread where the scheduler puts it.
  pthread_setaffinity_np(pthread_self(), CPU_ALLOC_SIZE(count), mask.get());
}

}  // namespace

LaneThreads::LaneThreads(const std::vector<int>& cpus) : lanes_(static_cast<int>(cpus.size())) {
  lanes_.spin_iterations = spin_iterations();
  // Ctrl-C and the host's other signals are for the host's threads.
  sigset_t all;
  sigset_t before;
  sigfillset(&all);
  pthread_sigmask(SIG_SETMASK, &all, &before);
  try {
    for (std::size_t i = 1; i < cpus.size(); ++i) {
      workers_.emplace_back([this, i, cpu = cpus[i]] {
        pthread_setname_np(pthread_self(), "hetcomp-lane");
        bind_to(cpu);
        work(static_cast<int>(i));
      });
    }
  } catch (...) {
    pthread_sigmask(SIG_SETMASK, &before, nullptr);
    shut_down();
    throw;
  }
  pthread_sigmask(SIG_SETMASK, &before, nullptr);
}

LaneThreads::~LaneThreads() { shut_down(); }

void LaneThreads::shut_down() {
  stop_.store(true, std::memory_order_relaxed);
  begun_.fetch_add(1, std::memory_order_seq_cst);
  futex_wake_all(begun_);
  for (std::thread& worker : workers_) worker.join();
}

void LaneThreads::work(int thread) {
  for (std::uint32_t seen = 0;; ++seen) {
    wait_change(begun_, seen, sleeping_, lanes_.spin_iterations);
    if (stop_.load(std::memory_order_relaxed)) return;
    Lane lane{&lanes_, thread};
    program_->run(&lane, step_);
    if (running_.fetch_sub(1, std::memory_order_acq_rel) == 1) futex_wake_all(running_);
  }
}

std::int32_t LaneThreads::run(const hetcomp_program& program, const hetcomp_step& step) {
  program_ = &program;
  step_ = &step;
  lanes_.error.store(0, std::memory_order_relaxed);
  running_.store(static_cast<std::uint32_t>(workers_.size()), std::memory_order_relaxed);
  begun_.fetch_add(1, std::memory_order_seq_cst);
  if (sleeping_.load(std::memory_order_seq_cst) != 0) futex_wake_all(begun_);

  Lane lane{&lanes_, 0};
  program.run(&lane, &step);

  // The last barrier was passed by all, but `step` is the caller's: nobody may still be looking at it.
  std::int32_t spins = lanes_.spin_iterations;
  for (std::uint32_t left; (left = running_.load(std::memory_order_acquire)) != 0;) {
    if (spins-- > 0)
      cpu_relax();
    else
      futex_wait(running_, left);
  }
  return lanes_.error.load(std::memory_order_relaxed);
}

}  // namespace hetcomp
