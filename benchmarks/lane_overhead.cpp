// Times of lanes without and with weights to stream, as one line of JSON a case.
//   lane_overhead BOUND REPEATS THREADS,THREADS,...
// BOUND 1: every thread has a CPU of its own. Beside `lanes`, which is hetcomp/lane.h, stand a barrier where
// every thread has a line of its own (`gathered`) and work that is drawn from the first task on (`drawn`).
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

// A number on a cache line of its own.
struct alignas(64) Number {
  std::atomic<std::int64_t> value{0};
};

struct Shared {
  explicit Shared(int threads) : arrivals(static_cast<std::size_t>(threads)) {}
  std::vector<Number> arrivals;
  Number generation;
  Number next[2];  // of regions in turns
};

struct Thread {
  Lane lane;
  Shared* shared;
  std::int64_t region = 0;
  std::uint64_t sum = 0;
};

void gathered_barrier(Thread& t) {
  Shared& shared = *t.shared;
  const std::int64_t reached = shared.generation.value.load(std::memory_order_relaxed) + 1;
  if (t.lane.thread == 0) {
    for (std::size_t i = 1; i < shared.arrivals.size(); ++i)
      while (shared.arrivals[i].value.load(std::memory_order_acquire) != reached) hetcomp::cpu_relax();
    shared.generation.value.store(reached, std::memory_order_seq_cst);
  } else {
    shared.arrivals[static_cast<std::size_t>(t.lane.thread)].value.store(reached, std::memory_order_seq_cst);
    while (shared.generation.value.load(std::memory_order_acquire) != reached) hetcomp::cpu_relax();
  }
}

template <class Body>
void drawn_for(Thread& t, std::int64_t n_tasks, std::int64_t grain, Body&& body) {
  std::atomic<std::int64_t>& next = t.shared->next[t.region % 2].value;
  // Nobody draws from the other one: all are behind the barrier after the region before.
  if (t.lane.thread == 0) t.shared->next[(t.region + 1) % 2].value.store(0, std::memory_order_relaxed);
  ++t.region;
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
  Shared shared(threads);
  double us = 0;
  const auto work = [&](int thread) {
    if (bound) {
      cpu_set_t mask;
      CPU_ZERO(&mask);
      CPU_SET(thread, &mask);
      sched_setaffinity(0, sizeof mask, &mask);
    }
    Thread t{Lane{&set, thread}, &shared};
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
  print("barrier, gathered", n,
        time_of(n, bound, kCalls, [](Thread& t, std::int64_t) { gathered_barrier(t); }));
  print("barrier, lanes", n, time_of(n, bound, kCalls, [](Thread& t, std::int64_t) { barrier(t.lane); }));
  print("one thread alone, lanes", n, time_of(n, bound, kCalls, [](Thread& t, std::int64_t) {
          alone_begin(t.lane, true);
          alone_end(t.lane, true);
        }));
  for (const std::int64_t draws : {1, 4}) {
    const std::string what = "empty region of " + std::to_string(draws) + " draws a thread, ";
    print((what + "drawn").c_str(), n, time_of(n, bound, kCalls, [&](Thread& t, std::int64_t) {
            drawn_for(t, draws * n, 1, nothing);
            barrier(t.lane);
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
  const auto drawn = [&](Thread& t, std::int64_t call) {
    drawn_for(t, tasks, std::max<std::int64_t>(1, tasks / (2 * n)),
              [&](std::int64_t begin, std::int64_t end) {
                stream(t, weights(call) + begin * kTask, weights(call) + end * kTask);
              });
    barrier(t.lane);
  };
  const std::int64_t first = std::max<std::int64_t>(1, tasks / (2 * n));
  const auto shared = [&](Thread& t, std::int64_t call) {
    stream_for(t.lane, tasks, {first, 2}, [&](std::int64_t begin, std::int64_t end, std::int64_t) {
      stream(t, weights(call) + begin * kTask, weights(call) + end * kTask);
    });
  };
  print((what + "drawn").c_str(), n, time_of(n, bound, calls, drawn), static_cast<double>(bytes));
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
