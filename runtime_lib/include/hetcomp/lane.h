// Lanes: the worker threads that execute a compiled program together (SPMD), on all NUMA nodes it was cut
// for.
//
// Every thread of a lane set runs the same program function. Work inside an op is shared out by
// parallel_for() and stream_for(): every thread has a part of its own and draws the rest from a shared
// counter, so that a thread which the OS takes away only delays the tasks it holds. barrier() separates ops
// which depend on each other; what takes less time than a barrier, one thread does within one
// (alone_begin()). A waiting thread spins for a few microseconds and then parks on a futex: on a busy desktop
// the core goes to whoever needs it.
//
// Beside a GPU, await_gpu() and answer_gpu() hand over between the lanes and its graph.
//
// This header is compiled into the runtime (which owns the threads) and into every generated program (which
// runs on them). Any change of a struct layout here must raise HETCOMP_PROGRAM_ABI in program.h.
#pragma once

#include <linux/futex.h>
#include <sched.h>
#include <sys/syscall.h>
#include <unistd.h>

#include <algorithm>
#include <atomic>
#include <climits>
#include <cstdint>

#include "hetcomp/program.h"

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
  // Nobody else wants the threads' CPUs: they will be about equally fast.
  bool quiet = true;

  alignas(64) std::atomic<std::uint32_t> arrived{0};
  alignas(64) std::atomic<std::uint32_t> generation{0};
  alignas(64) std::atomic<std::uint32_t> parked{0};  // threads that sleep until `generation` changes
  // 1: thread 0 sleeps until all have arrived.
  alignas(64) std::atomic<std::uint32_t> first_parked{0};
  // First error of a kernel in this step (0: none). The step runs to its end: a lane that left early would
  // leave the others waiting at the next barrier.
  alignas(64) std::atomic<std::int32_t> error{0};
  TaskCounter counters[kCounters];
};

// One thread's view of its lane set. Lives on the thread's stack for the length of one step.
struct Lane {
  LaneSet* set;
  int thread;                      // 0 .. set->n_threads - 1
  std::uint32_t region = 0;        // number of shared-out regions so far; equal on all threads
  std::uint32_t first_region = 0;  // value of `region` at the last barrier
  // For ops whose weights are cut over NUMA nodes: this thread computes the parts of the nodes first_node ..
  // last_node - 1, together with the threads of `own->set` and nobody else. One node, unless there are fewer
  // threads than nodes. Null where the program has one node.
  Lane* own = nullptr;
  int first_node = 0;
  int last_node = 1;
  bool alone = false;  // thread 0 between alone_begin() and alone_end()

  int threads() const { return alone ? 1 : set->n_threads; }  // that share out work
};

// Waits until `goes_on(word)`. Whoever changes the word then looks at `sleeping`, the number of threads that
// are parked on it, and wakes them.
template <class GoesOn>
inline void wait_until(const LaneSet& set, std::atomic<std::uint32_t>& word,
                       std::atomic<std::uint32_t>& sleeping, GoesOn&& goes_on) {
  std::int32_t spins = set.spin_iterations;
  for (std::uint32_t seen; !goes_on(seen = word.load(std::memory_order_acquire));) {
    if (spins-- > 0) {
      cpu_relax();
      continue;
    }
    // seq_cst, as the change of the word and the look at `sleeping`: either the futex call sees the new
    // value, or this thread is seen.
    sleeping.fetch_add(1, std::memory_order_seq_cst);
    futex_wait(word, seen);
    sleeping.fetch_sub(1, std::memory_order_relaxed);
  }
}

// Of all threads only the last to arrive sees true.
inline bool arrive(LaneSet& set) {
  return set.arrived.fetch_add(1, std::memory_order_seq_cst) + 1 == static_cast<std::uint32_t>(set.n_threads);
}

// All have arrived: nobody draws from the counters of this epoch any more.
inline void reset(Lane& lane) {
  for (std::uint32_t r = lane.first_region; r != lane.region; ++r)
    lane.set->counters[r % LaneSet::kCounters].next.store(0, std::memory_order_relaxed);
  lane.set->arrived.store(0, std::memory_order_relaxed);
}

inline void release(LaneSet& set) {
  set.generation.store(set.generation.load(std::memory_order_relaxed) + 1, std::memory_order_seq_cst);
  if (set.parked.load(std::memory_order_seq_cst) != 0) futex_wake_all(set.generation);
}

inline void wait_for_release(LaneSet& set, std::uint32_t generation) {
  wait_until(set, set.generation, set.parked, [&](std::uint32_t seen) { return seen != generation; });
}

// Waits until all threads of the set have arrived. What any of them wrote before is visible to all after.
inline void barrier(Lane& lane) {
  if (lane.threads() == 1) return;
  LaneSet& set = *lane.set;
  const std::uint32_t generation = set.generation.load(std::memory_order_relaxed);
  if (arrive(set)) {
    reset(lane);
    release(set);
  } else {
    wait_for_release(set, generation);
  }
  lane.first_region = lane.region;
}

// A barrier within which thread 0 works alone, if `alone`: true on the threads that have work to do until
// alone_end(), which all of them call. Alone, parallel_for() takes all tasks and barriers are none.
inline bool alone_begin(Lane& lane, bool alone) {
  if (!alone || lane.threads() == 1) {
    barrier(lane);
    return true;
  }
  LaneSet& set = *lane.set;
  const std::uint32_t generation = set.generation.load(std::memory_order_relaxed);
  const bool last = arrive(set);
  if (lane.thread == 0) {
    const auto all = static_cast<std::uint32_t>(set.n_threads);
    wait_until(set, set.arrived, set.first_parked, [&](std::uint32_t seen) { return seen == all; });
    reset(lane);
    lane.alone = true;
  } else {
    if (last && set.first_parked.load(std::memory_order_seq_cst) != 0) futex_wake_all(set.arrived);
    wait_for_release(set, generation);
  }
  lane.first_region = lane.region;
  return lane.alone;
}

// All go on together. Without `alone` a barrier as any other.
inline void alone_end(Lane& lane, bool alone) {
  if (!alone) return barrier(lane);
  if (!lane.alone) return;
  lane.alone = false;
  release(*lane.set);
}

// Waits until the GPU has come to hand-over `flag`, as a barrier, within which thread 0 then does `first()`.
// False, on all threads alike: the step was given up; the program goes to its end.
template <class First>
inline bool await_gpu(Lane& lane, const hetcomp_step& step, std::uint32_t flag, First&& first) {
  hetcomp_hand_over& hand_over = *step.hand_over;
  // The others read it after the barrier, when thread 0 may already have given up at a later flag: that is
  // why they compare, and why it must be atomic.
  const std::atomic_ref<std::uint32_t> given_up(hand_over.given_up);
  if (lane.thread == 0) {
    if (hand_over.wait(hand_over.host, flag) != 0)
      first();
    else
      given_up.store(flag, std::memory_order_relaxed);
  }
  barrier(lane);
  return given_up.load(std::memory_order_relaxed) > flag;
}

inline bool await_gpu(Lane& lane, const hetcomp_step& step, std::uint32_t flag) {
  return await_gpu(lane, step, flag, [] {});
}

// Shows the routing of a MoE layer to who asks for it. The threads go on together, with what may have been
// written to it; where it comes with hand-over `flag` of a GPU, they do so when that is awaited.
inline void show_routing(Lane& lane, const hetcomp_step& step, std::int32_t experts, std::int32_t top_k,
                         void* ids, void* weights, std::uint32_t flag = HETCOMP_NO_FLAG) {
  if (step.routing == nullptr) return;
  if (lane.thread == 0)
    step.routing->routed(step.routing->host, flag, experts, top_k, static_cast<std::int32_t*>(ids),
                         static_cast<float*>(weights));
  if (flag == HETCOMP_NO_FLAG) barrier(lane);
}

// Whether there is nothing to compute for hand-over `flag`, which was awaited.
inline bool nothing_to_do(const hetcomp_step& step, std::uint32_t flag) {
  return step.hand_over->skip != nullptr && step.hand_over->skip[flag] != 0;
}

// Hands to the GPU what all threads have computed for hand-over `flag`, after a barrier.
inline void answer_gpu(Lane& lane, const hetcomp_step& step, std::uint32_t flag) {
  barrier(lane);
  if (lane.thread == 0) step.hand_over->answer(step.hand_over->host, flag);
}

// An extra barrier if the program takes more counters between two barriers than there are.
inline void take_counters(Lane& lane, std::uint32_t n) {
  if (lane.region - lane.first_region + n > LaneSet::kCounters) barrier(lane);
}

// How far the groups of a region's tasks are, instead of a barrier before the next region: its tasks each
// wait for the groups whose results they read. As tasks are drawn in order, most groups are complete by then,
// and nobody stands idle until the slowest thread is done. Every thread of the set must make them in the same
// order.
class Progress {
 public:
  // More groups than this would be more to reset than a barrier costs.
  static constexpr std::int32_t kMostGroups = 16;

  Progress(Lane& lane, std::int32_t groups) : set_(*lane.set) {
    take_counters(lane, static_cast<std::uint32_t>(groups));
    first_ = lane.region;
    lane.region += static_cast<std::uint32_t>(groups);
  }
  void done(std::int32_t group, std::int64_t tasks = 1) const {
    counter(group).next.fetch_add(tasks, std::memory_order_release);
  }
  // Waits until `tasks` of the group are done.
  void await(std::int32_t group, std::int64_t tasks) const {
    const TaskCounter& finished = counter(group);
    for (std::int32_t spins = set_.spin_iterations; finished.next.load(std::memory_order_acquire) < tasks;) {
      if (spins-- > 0)
        cpu_relax();
      else
        sched_yield();  // whoever holds the missing task may need this CPU
    }
  }

 private:
  TaskCounter& counter(std::int32_t group) const {
    return set_.counters[(first_ + static_cast<std::uint32_t>(group)) % LaneSet::kCounters];
  }

  LaneSet& set_;
  std::uint32_t first_;
};

// Tasks of one region as a thread gets them: first a chunk of its own, then chunks from a shared counter.
class Draws {
 public:
  // Threads of the set must make them in the same order.
  Draws(Lane& lane, std::int64_t n_tasks, std::int64_t first, std::int64_t grain)
      : n_tasks_(n_tasks), drawn_(lane.threads() * first), grain_(grain) {
    take_counters(lane, 1);
    counter_ = &lane.set->counters[lane.region++ % LaneSet::kCounters];
  }
  // Begin of the next chunk; n_tasks: none is left.
  std::int64_t next() {
    if (drawn_ >= n_tasks_) return n_tasks_;
    return std::min(n_tasks_, drawn_ + counter_->next.fetch_add(grain_, std::memory_order_relaxed));
  }

 private:
  const std::int64_t n_tasks_, drawn_, grain_;
  TaskCounter* counter_;
};

// Tasks in the order of weights in memory: `first` of them adjacent for every thread, then `grain` at a time.
struct Shares {
  std::int64_t first;
  std::int64_t grain;
};

// Runs body(begin, end, next) over [0, n_tasks). `next` is where this thread will go on, n_tasks if nowhere:
// its weights can be fetched before those in hand are used up. Every thread of the set must make the same
// calls in the same order. There is no barrier at the end.
template <class Body>
inline void stream_for(Lane& lane, std::int64_t n_tasks, Shares shares, Body&& body) {
  if (lane.threads() == 1) {
    if (n_tasks > 0) body(std::int64_t{0}, n_tasks, n_tasks);
    return;
  }
  Draws draws(lane, n_tasks, shares.first, shares.grain);
  std::int64_t begin = std::min(n_tasks, lane.thread * shares.first);
  std::int64_t end = std::min(n_tasks, begin + shares.first);
  if (begin == end) end = std::min(n_tasks, (begin = draws.next()) + shares.grain);
  while (begin < n_tasks) {
    const std::int64_t next = draws.next();
    body(begin, end, next);
    begin = next;
    end = std::min(n_tasks, begin + shares.grain);
  }
}

// Runs body(begin, end) over [0, n_tasks) in chunks of at most `grain` tasks. As stream_for(), but a thread
// draws a chunk only when it is done with the one before.
template <class Body>
inline void parallel_for(Lane& lane, std::int64_t n_tasks, std::int64_t grain, Body&& body) {
  if (lane.threads() == 1) {
    if (n_tasks > 0) body(std::int64_t{0}, n_tasks);
    return;
  }
  Draws draws(lane, n_tasks, grain, grain);
  for (std::int64_t begin = lane.thread * grain; begin < n_tasks; begin = draws.next())
    body(begin, std::min(n_tasks, begin + grain));
}

// Chunk size that gives every thread about `chunks_per_thread` draws: few enough that the counter costs
// nothing, enough that a descheduled thread holds back little.
inline std::int64_t grain_for(const Lane& lane, std::int64_t n_tasks, std::int64_t chunks_per_thread = 4) {
  return std::max<std::int64_t>(1, n_tasks / (chunks_per_thread * lane.threads()));
}

}  // namespace hetcomp
