// Lanes: the worker threads that execute a compiled program together (SPMD), on all NUMA nodes it was cut
// for.
//
// Every thread of a lane set runs the same program function. Work inside an op is handed out by
// parallel_for() from a shared counter, so that a thread which the OS takes away only delays the task it
// holds; barrier() separates ops which depend on each other. A waiting thread spins for a few microseconds
// and then parks on a futex: on a busy desktop the core goes to whoever needs it.
//
// This header is compiled into the runtime (which owns the threads) and into every generated program (which
// runs on them). Any change of a struct layout here must raise HETCOMP_PROGRAM_ABI in program.h.
#pragma once

#include <linux/futex.h>
#include <sys/syscall.h>
#include <unistd.h>

#include <atomic>
#include <climits>
#include <cstdint>

namespace hetcomp {

inline void cpu_relax() {
#if defined(__x86_64__)
  __builtin_ia32_pause();
#endif
}

inline void futex_wait(std::atomic<std::uint32_t>& word, std::uint32_t expected) {
  syscall(SYS_futex, reinterpret_cast<std::uint32_t*>(&word), FUTEX_WAIT_PRIVATE, expected, nullptr, nullptr,
          0);
}

inline void futex_wake_all(std::atomic<std::uint32_t>& word) {
  syscall(SYS_futex, reinterpret_cast<std::uint32_t*>(&word), FUTEX_WAKE_PRIVATE, INT_MAX, nullptr, nullptr,
          0);
}

// A task counter on a cache line of its own.
struct alignas(64) TaskCounter {
  std::atomic<std::int64_t> next{0};
};

// State shared by the threads of one lane set.
struct LaneSet {
  static constexpr std::uint32_t kCounters = 64;  // regions between two barriers; a power of two

  explicit LaneSet(int threads) : n_threads(threads) {}

  const int n_threads;
  // Iterations of pause before a waiting thread parks; set by the runtime from a measured pause latency.
  std::int32_t spin_iterations = 2000;

  alignas(64) std::atomic<std::uint32_t> arrived{0};
  alignas(64) std::atomic<std::uint32_t> generation{0};
  alignas(64) std::atomic<std::uint32_t> parked{0};
  // First error of a kernel in this step (0: none). The step runs to its end: a lane that left early would
  // leave the others waiting at the next barrier.
  alignas(64) std::atomic<std::int32_t> error{0};
  TaskCounter counters[kCounters];
};

// One thread's view of its lane set. Lives on the thread's stack for the length of one step.
struct Lane {
  LaneSet* set;
  int thread;                      // 0 .. set->n_threads - 1
  std::uint32_t region = 0;        // number of parallel_for calls so far; equal on all threads
  std::uint32_t first_region = 0;  // value of `region` at the last barrier
  // For ops whose weights are cut over NUMA nodes: this thread computes the parts of the nodes first_node ..
  // last_node - 1, together with the threads of `own->set` and nobody else. One node, unless there are fewer
  // threads than nodes. Null where the program has one node.
  Lane* own = nullptr;
  int first_node = 0;
  int last_node = 1;
};

// Waits until all threads of the set have arrived. What any of them wrote before is visible to all after.
inline void barrier(Lane& lane) {
  LaneSet& set = *lane.set;
  if (set.n_threads > 1) {
    const std::uint32_t generation = set.generation.load(std::memory_order_relaxed);
    if (set.arrived.fetch_add(1, std::memory_order_acq_rel) + 1 ==
        static_cast<std::uint32_t>(set.n_threads)) {
      // Last to arrive: nobody draws from the counters of this epoch any more.
      for (std::uint32_t r = lane.first_region; r != lane.region; ++r)
        set.counters[r % LaneSet::kCounters].next.store(0, std::memory_order_relaxed);
      set.arrived.store(0, std::memory_order_relaxed);
      // seq_cst pairs with the waiter's `parked` increment: either the waiter sees the new generation in the
      // futex call, or we see it parked.
      set.generation.store(generation + 1, std::memory_order_seq_cst);
      if (set.parked.load(std::memory_order_seq_cst) != 0) futex_wake_all(set.generation);
    } else {
      std::int32_t spins = set.spin_iterations;
      while (set.generation.load(std::memory_order_acquire) == generation) {
        if (spins-- > 0) {
          cpu_relax();
          continue;
        }
        set.parked.fetch_add(1, std::memory_order_seq_cst);
        futex_wait(set.generation, generation);
        set.parked.fetch_sub(1, std::memory_order_relaxed);
      }
    }
  } else {
    for (std::uint32_t r = lane.first_region; r != lane.region; ++r)
      set.counters[r % LaneSet::kCounters].next.store(0, std::memory_order_relaxed);
  }
  lane.first_region = lane.region;
}

// Runs body(begin, end) over [0, n_tasks) in chunks of at most `grain` tasks drawn from a shared counter.
// Every thread of the set must make the same calls in the same order. There is no barrier at the end.
template <class Body>
inline void parallel_for(Lane& lane, std::int64_t n_tasks, std::int64_t grain, Body&& body) {
  // A program with more regions than counters between two barriers gets an extra barrier.
  if (lane.region - lane.first_region == LaneSet::kCounters) barrier(lane);
  TaskCounter& counter = lane.set->counters[lane.region++ % LaneSet::kCounters];
  if (lane.set->n_threads == 1) {
    if (n_tasks > 0) body(std::int64_t{0}, n_tasks);
    return;
  }
  for (;;) {
    const std::int64_t begin = counter.next.fetch_add(grain, std::memory_order_relaxed);
    if (begin >= n_tasks) return;
    body(begin, begin + grain < n_tasks ? begin + grain : n_tasks);
  }
}

// Chunk size that gives every thread about `chunks_per_thread` draws: few enough that the counter costs
// nothing, enough that a descheduled thread holds back little.
inline std::int64_t grain_for(const Lane& lane, std::int64_t n_tasks, std::int64_t chunks_per_thread = 4) {
  const std::int64_t chunks = chunks_per_thread * lane.set->n_threads;
  const std::int64_t grain = n_tasks / chunks;
  return grain > 0 ? grain : 1;
}

}  // namespace hetcomp
