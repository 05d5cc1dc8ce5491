// Times of lanes without and with weights to stream, as one line of JSON a case.
//   lane_overhead BOUND REPEATS THREADS,THREADS,...
// BOUND 1: every thread has a CPU of its own. Two ways stand beside each other: `counter` is a barrier that
// counts arrivals in one number and work drawn from one counter only; `lanes` is hetcomp/lane.h.
#include <sched.h>
#include <sys/mman.h>

#include <algorithm>
#include <chrono>
#include <cstdint>
#include <cstdio>
#include <cstdlib>
#include <sstream>
#include <string>
#include <thread>
#include <vector>

#include "hetcomp/lane.h"

namespace {

using hetcomp::Lane;
using hetcomp::LaneSet;
using Vector = std::uint64_t __attribute__((vector_size(64)));

constexpr std::int64_t kFootprint = std::int64_t{2} << 30;
constexpr std::int64_t kTask = 18432;  // a q4 panel of 2048 columns

struct alignas(64) Counter {
  std::atomic<std::int64_t> value{0};
};

// The barrier and the draws that lane.h had before: all threads add to one number.
struct CounterSet {
  Counter arrived, generation, next[2];
};

struct Thread {
  Lane lane;
  CounterSet* counters;
  std::int64_t region = 0;
  std::uint64_t sum = 0;
};

void counter_barrier(Thread& t) {
  CounterSet& set = *t.counters;
  const std::int64_t generation = set.generation.value.load(std::memory_order_relaxed);
  if (set.arrived.value.fetch_add(1, std::memory_order_acq_rel) + 1 == t.lane.set->n_threads) {
    set.next[t.region % 2].value.store(0, std::memory_order_relaxed);
    set.arrived.value.store(0, std::memory_order_relaxed);
    set.generation.value.store(generation + 1, std::memory_order_seq_cst);
  } else {
    while (set.generation.value.load(std::memory_order_acquire) == generation) hetcomp::cpu_relax();
  }
  ++t.region;
}

template <class Body>
void counter_for(Thread& t, std::int64_t n_tasks, std::int64_t grain, Body&& body) {
  std::atomic<std::int64_t>& next = t.counters->next[t.region % 2].value;
  for (std::int64_t i; (i = next.fetch_add(grain, std::memory_order_relaxed)) < n_tasks;)
    body(i, std::min(n_tasks, i + grain));
}

void stream(Thread& t, const std::uint8_t* at, const std::uint8_t* end) {
  Vector sums[4] = {};
  for (; at < end; at += sizeof(sums)) {
    const auto* v = reinterpret_cast<const Vector*>(at);
    for (int i = 0; i < 4; ++i) sums[i] ^= v[i];
  }
  const Vector all = (sums[0] ^ sums[1]) ^ (sums[2] ^ sums[3]);
  t.sum ^= all[0] ^ all[7];
}

// Microseconds of one of `calls` calls of body(thread, call) on so many threads.
template <class Body>
double time_of(int threads, bool bound, std::int64_t calls, Body&& body) {
  LaneSet set(threads);
  set.spin_iterations = 1 << 20;  // nobody parks
  CounterSet counters;
  double us = 0;
  const auto work = [&](int thread) {
    if (bound) {
      cpu_set_t mask;
      CPU_ZERO(&mask);
      CPU_SET(thread, &mask);
      sched_setaffinity(0, sizeof mask, &mask);
    }
    Thread t{Lane{&set, thread}, &counters};
    for (int i = 0; i < 100; ++i) barrier(t.lane);
    const auto start = std::chrono::steady_clock::now();
    for (std::int64_t c = 0; c < calls; ++c) body(t, c);
    barrier(t.lane);
    if (thread == 0)
      us = std::chrono::duration<double, std::micro>(std::chrono::steady_clock::now() - start).count();
    volatile std::uint64_t keep = t.sum;
    (void)keep;
  };
  std::vector<std::jthread> workers;
  for (int i = 1; i < threads; ++i) workers.emplace_back(work, i);
  std::jthread first(work, 0);
  first.join();
  workers.clear();
  return us / static_cast<double>(calls);
}

void print(const char* name, int threads, double us, double bytes = 0) {
  std::printf("{\"name\": \"%s\", \"threads\": %d, \"us\": %.4f, \"bytes\": %.0f}\n", name, threads, us,
              bytes);
  std::fflush(stdout);
}

void overheads(int n, bool bound) {
  constexpr std::int64_t kCalls = 20000;
  const auto nothing = [](std::int64_t, std::int64_t) {};
  print("barrier, counter", n,
        time_of(n, bound, kCalls, [](Thread& t, std::int64_t) { counter_barrier(t); }));
  print("barrier, lanes", n, time_of(n, bound, kCalls, [](Thread& t, std::int64_t) { barrier(t.lane); }));
  print("one thread alone, two counters", n, time_of(n, bound, kCalls, [](Thread& t, std::int64_t) {
          counter_barrier(t);
          counter_barrier(t);
        }));
  print("one thread alone, lanes", n, time_of(n, bound, kCalls, [](Thread& t, std::int64_t) {
          alone_begin(t.lane, true);
          alone_end(t.lane, true);
        }));
  for (const std::int64_t draws : {1, 4}) {
    const std::string what = "empty region of " + std::to_string(draws) + " draws a thread, ";
    print((what + "counter").c_str(), n, time_of(n, bound, kCalls, [&](Thread& t, std::int64_t) {
            counter_for(t, draws * n, 1, nothing);
            counter_barrier(t);
          }));
    print((what + "lanes").c_str(), n, time_of(n, bound, kCalls, [&](Thread& t, std::int64_t) {
            parallel_for(t.lane, draws * n, 1, nothing);
            barrier(t.lane);
          }));
  }
}

// Ops of `bytes` of weights, one after the other over the whole buffer.
void streams(int n, bool bound, const std::uint8_t* data, std::int64_t bytes) {
  const std::int64_t tasks = bytes / kTask,
                     calls = std::max<std::int64_t>(8, (std::int64_t{4} << 30) / bytes);
  const auto weights = [&](std::int64_t call) { return data + call * bytes % (kFootprint - bytes); };
  const std::string what = "stream of " + std::to_string(bytes / 1000) + " kB, ";
  const auto counted = [&](Thread& t, std::int64_t call) {
    counter_for(t, tasks, std::max<std::int64_t>(1, tasks / (2 * n)),
                [&](std::int64_t begin, std::int64_t end) {
                  stream(t, weights(call) + begin * kTask, weights(call) + end * kTask);
                });
    counter_barrier(t);
  };
  const std::int64_t first = std::max<std::int64_t>(1, tasks / (2 * n));
  const auto shared = [&](Thread& t, std::int64_t call) {
    stream_for(t.lane, tasks, {first, 2}, [&](std::int64_t begin, std::int64_t end, std::int64_t) {
      stream(t, weights(call) + begin * kTask, weights(call) + end * kTask);
    });
  };
  print((what + "counter").c_str(), n, time_of(n, bound, calls, counted), static_cast<double>(bytes));
  print((what + "lanes").c_str(), n,
        time_of(n, bound, calls,
                [&](Thread& t, std::int64_t call) {
                  shared(t, call);
                  barrier(t.lane);
                }),
        static_cast<double>(bytes));
}

}  // namespace

int main(int argc, char** argv) {
  if (argc != 4) return 2;
  const bool bound = std::atoi(argv[1]) != 0;
  void* memory = mmap(nullptr, kFootprint, PROT_READ | PROT_WRITE, MAP_PRIVATE | MAP_ANONYMOUS, -1, 0);
  if (memory == MAP_FAILED) {
    std::fprintf(stderr, "no memory for %lld bytes\n", static_cast<long long>(kFootprint));
    return 1;
  }
  madvise(memory, kFootprint, MADV_HUGEPAGE);
  auto* data = static_cast<std::uint8_t*>(memory);
  for (std::int64_t i = 0; i < kFootprint; i += 4096) data[i] = 1;
  for (int repeat = 0; repeat < std::atoi(argv[2]); ++repeat) {
    std::stringstream counts(argv[3]);
    for (std::string count; std::getline(counts, count, ',');) {
      const int n = std::atoi(count.c_str());
      overheads(n, bound);
      // attn.o and the chosen experts of a layer of Qwen3-30B-A3B in q4.
      for (const std::int64_t bytes : {256 * kTask, 1152 * kTask}) streams(n, bound, data, bytes);
    }
  }
}
