#include "lane_threads.h"

#include <pthread.h>
#include <sched.h>
#include <sys/resource.h>

#include <algorithm>
#include <chrono>
#include <csignal>
#include <cstdlib>
#include <memory>

namespace hetcomp {
namespace {

// How long a lane spins before it parks. While nobody else wants the cores, the others arrive within this
// time and a futex call would only cost. Under contention a lane must give its core away at once, so that the
// scheduler can move the lane that was preempted there. Measured with one busy process beside the lanes
// (Linux 6.18, 100 regions of about 60 us), speed in relation to a quiet machine:
//   always spin  5 us: 0.51 on 2 cores, 0.81 on 8;  20 us: 0.42, 0.46;  200 us: 0.20 on 2 cores
//   every lane bound to a CPU of its own, 5 us: 0.39, 0.38
//   this switch of spin times: 0.48 to 0.56 on 2 cores, 0.67 on 8
constexpr std::chrono::nanoseconds kQuietSpin{50'000};
constexpr std::chrono::nanoseconds kContendedSpin{2'000};

// A process that shares a core preempts a lane every few milliseconds; a quiet system a few times a second.
constexpr std::chrono::nanoseconds kWindow{20'000'000};
constexpr std::int64_t kContendedPreemptionsPerWindow = 2;

// The shortest of several probes: the others may have been interrupted.
double pause_nanoseconds() {
  constexpr int kPauses = 200;
  double shortest = 1e9;
  for (int probe = 0; probe < 10; ++probe) {
    const auto start = std::chrono::steady_clock::now();
    for (int i = 0; i < kPauses; ++i) cpu_relax();
    const std::chrono::duration<double, std::nano> spent = std::chrono::steady_clock::now() - start;
    shortest = std::min(shortest, spent.count() / kPauses);
  }
  return std::max(shortest, 0.5);
}

std::int32_t spins_for(std::chrono::nanoseconds time) {
  static const double each = pause_nanoseconds();
  return static_cast<std::int32_t>(static_cast<double>(time.count()) / each);
}

// Of the calling thread, since it began.
std::int64_t preemptions() {
  rusage usage{};
  getrusage(RUSAGE_THREAD, &usage);
  return usage.ru_nivcsw;
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

// The calling thread may run on these CPUs only. Those that were taken away meanwhile do not count; if none
// is left, the thread stays where the scheduler puts it.
void bind_to(const std::vector<int>& cpus) {
  struct MaskFree {
    void operator()(cpu_set_t* mask) const { CPU_FREE(mask); }
  };
  const auto count = static_cast<std::size_t>(*std::max_element(cpus.begin(), cpus.end())) + 1;
  const std::unique_ptr<cpu_set_t, MaskFree> mask(CPU_ALLOC(count));
  if (!mask) return;
  CPU_ZERO_S(CPU_ALLOC_SIZE(count), mask.get());
  for (const int cpu : cpus) CPU_SET_S(static_cast<std::size_t>(cpu), CPU_ALLOC_SIZE(count), mask.get());
  pthread_setaffinity_np(pthread_self(), CPU_ALLOC_SIZE(count), mask.get());
}

}  // namespace

void ContentionGauge::add(std::int64_t preemptions, std::chrono::nanoseconds step) {
  preemptions_ += preemptions;
  observed_ += step;
  if (observed_ < kWindow) return;
  contended_ = preemptions_ * kWindow.count() >= kContendedPreemptionsPerWindow * observed_.count();
  preemptions_ = 0;
  observed_ = std::chrono::nanoseconds{0};
}

LaneThreads::LaneThreads(const std::vector<int>& cpus)
    : lanes_(static_cast<int>(cpus.size())),
      quiet_spins_(spins_for(kQuietSpin)),
      contended_spins_(spins_for(kContendedSpin)),
      reports_(cpus.size()) {
  lanes_.spin_iterations = quiet_spins_;
  // Ctrl-C and the host's other signals are for the host's threads.
  sigset_t all;
  sigset_t before;
  sigfillset(&all);
  pthread_sigmask(SIG_SETMASK, &all, &before);
  try {
    for (std::size_t i = 1; i < cpus.size(); ++i) {
      workers_.emplace_back([this, i, cpus] {
        pthread_setname_np(pthread_self(), "hetcomp-lane");
        bind_to(cpus);
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

void LaneThreads::run_lane(int thread) {
  const std::int64_t before = preemptions();
  Lane lane{&lanes_, thread};
  program_->run(&lane, step_);
  reports_[static_cast<std::size_t>(thread)].preemptions.store(preemptions() - before,
                                                               std::memory_order_relaxed);
}

void LaneThreads::work(int thread) {
  for (std::uint32_t seen = 0;; ++seen) {
    wait_change(begun_, seen, sleeping_, contended_spins_);
    if (stop_.load(std::memory_order_relaxed)) return;
    run_lane(thread);
    if (running_.fetch_sub(1, std::memory_order_acq_rel) == 1) futex_wake_all(running_);
  }
}

std::int32_t LaneThreads::run(const hetcomp_program& program, const hetcomp_step& step) {
  const auto start = std::chrono::steady_clock::now();
  program_ = &program;
  step_ = &step;
  lanes_.error.store(0, std::memory_order_relaxed);
  lanes_.spin_iterations = gauge_.contended() ? contended_spins_ : quiet_spins_;
  running_.store(static_cast<std::uint32_t>(workers_.size()), std::memory_order_relaxed);
  begun_.fetch_add(1, std::memory_order_seq_cst);
  if (sleeping_.load(std::memory_order_seq_cst) != 0) futex_wake_all(begun_);
  run_lane(0);

  // The last barrier was passed by all, but `step` is the caller's: nobody may still be looking at it.
  std::int32_t spins = lanes_.spin_iterations;
  for (std::uint32_t left; (left = running_.load(std::memory_order_acquire)) != 0;) {
    if (spins-- > 0)
      cpu_relax();
    else
      futex_wait(running_, left);
  }
  std::int64_t preempted = 0;
  for (const Report& report : reports_) preempted += report.preemptions.load(std::memory_order_relaxed);
  gauge_.add(preempted, std::chrono::steady_clock::now() - start);
  return lanes_.error.load(std::memory_order_relaxed);
}

}  // namespace hetcomp
