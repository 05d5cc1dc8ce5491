// Measures the memory of one NUMA node and prints the readings as JSON: [[key, [reading, ...]], ...].
//   memory_probe MODE MEBIBYTES CPU,CPU,... NODE CPU,CPU,...
// Threads pinned to the first CPUs read a buffer that lies on NODE; the second CPUs touch it first (none:
// "-").
//   read      key: threads; 10^9 bytes a second
//   all       the same with all threads only
//   sets      key: bytes that all threads together read again and again; 10^9 bytes a second
//   barrier   key: threads; microseconds a barrier
#include <pthread.h>
#include <sched.h>
#include <sys/mman.h>
#include <sys/syscall.h>
#include <unistd.h>

#include <algorithm>
#include <chrono>
#include <cstdint>
#include <cstdio>
#include <cstdlib>
#include <cstring>
#include <functional>
#include <string>
#include <thread>
#include <vector>

#include "hetcomp/lane.h"

namespace {

constexpr int kRepeats = 5;
constexpr std::int64_t kPage = 4096;
constexpr std::int64_t kDraw = 256 << 10;  // bytes of a part, as Tuning.draw_bytes
constexpr std::int64_t kSmallestSet = 256 << 10, kBytesOfASet = 256 << 20;
volatile std::uint64_t sink;

std::uint64_t read_all(const std::uint8_t* begin, const std::uint8_t* end) {
  using Word = std::uint64_t __attribute__((vector_size(64)));
  Word sums[4] = {};
  for (const std::uint8_t* p = begin; p + sizeof sums <= end; p += sizeof sums) {
    const auto* v = reinterpret_cast<const Word*>(p);
    for (int i = 0; i < 4; ++i) sums[i] ^= v[i];
  }
  const Word all = (sums[0] ^ sums[1]) ^ (sums[2] ^ sums[3]);
  return all[0] ^ all[1] ^ all[2] ^ all[3] ^ all[4] ^ all[5] ^ all[6] ^ all[7];
}

double now() {
  return std::chrono::duration<double>(std::chrono::steady_clock::now().time_since_epoch()).count();
}

// When a thread left the barriers around the work, on a cache line of its own.
struct alignas(64) Stamps {
  double start = 0, end = 0;
};

// Seconds that `threads` pinned threads take for work(thread, lane), between two barriers, `repeats` times.
// Clocks are read by all: the one that leaves a barrier first was not held up by other processes.
std::vector<double> timed(const std::vector<int>& cpus, int threads, int repeats,
                          const std::function<void(int, hetcomp::Lane&)>& work) {
  hetcomp::LaneSet set(threads);
  std::vector<double> seconds;
  std::vector<Stamps> stamps(static_cast<std::size_t>(threads));
  std::vector<std::thread> workers;
  for (int t = 0; t < threads; ++t) {
    workers.emplace_back([&, t] {
      cpu_set_t mask;
      CPU_ZERO(&mask);
      CPU_SET(cpus[static_cast<std::size_t>(t)], &mask);
      pthread_setaffinity_np(pthread_self(), sizeof mask, &mask);
      hetcomp::Lane lane{&set, t};
      Stamps& own = stamps[static_cast<std::size_t>(t)];
      for (int i = 0; i < repeats; ++i) {
        hetcomp::barrier(lane);
        own.start = now();
        work(t, lane);
        hetcomp::barrier(lane);
        own.end = now();
        hetcomp::barrier(lane);
        if (t != 0) continue;
        double start = own.start, end = own.end;
        for (const Stamps& s : stamps) {
          start = std::min(start, s.start);
          end = std::min(end, s.end);
        }
        seconds.push_back(end - start);
      }
    });
  }
  for (auto& worker : workers) worker.join();
  return seconds;
}

void print_readings(std::int64_t key, const std::vector<double>& seconds,
                    const std::function<double(double)>& rate) {
  static const char* comma = "";
  std::printf("%s[%lld, [", comma, static_cast<long long>(key));
  for (std::size_t i = 0; i < seconds.size(); ++i) std::printf("%s%.4f", i ? ", " : "", rate(seconds[i]));
  std::printf("]]");
  comma = ", ";
}

// Threads draw their parts, as those of kernels do: in equal parts the slowest thread would say how fast
// memory is.
void print_reads(const std::vector<int>& cpus, int threads, const std::uint8_t* data, std::int64_t bytes) {
  const std::int64_t parts = bytes / kDraw;
  const auto seconds = timed(cpus, threads, kRepeats, [&](int, hetcomp::Lane& lane) {
    std::uint64_t sum = 0;
    hetcomp::parallel_for(lane, parts, 1, [&](std::int64_t begin, std::int64_t end) {
      sum ^= read_all(data + begin * kDraw, data + end * kDraw);
    });
    sink = sum;
  });
  print_readings(threads, seconds, [&](double s) { return static_cast<double>(parts * kDraw) / s * 1e-9; });
}

std::vector<int> thread_counts(int all) {
  std::vector<int> counts;
  for (int n = 1; n < all; n *= 2) counts.push_back(n);
  if (all > 3) counts.push_back(all * 3 / 4);  // the best count is often below all cores
  counts.push_back(all);
  std::sort(counts.begin(), counts.end());
  counts.erase(std::unique(counts.begin(), counts.end()), counts.end());
  return counts;
}

std::vector<int> cpu_list(char* text) {
  std::vector<int> cpus;
  if (std::strcmp(text, "-") == 0) return cpus;
  for (char* word = std::strtok(text, ","); word; word = std::strtok(nullptr, ","))
    cpus.push_back(std::atoi(word));
  return cpus;
}

// Whether the kernel was told to take the pages from `node` only; containers may forbid it.
bool bind(void* memory, std::int64_t bytes, int node) {
  constexpr int kBind = 2;  // MPOL_BIND of linux/mempolicy.h, which not every system has
  std::uint64_t mask[16] = {};
  if (node < 0 || node >= 1024) return false;
  mask[node / 64] = std::uint64_t{1} << (node % 64);
  return syscall(SYS_mbind, memory, static_cast<std::size_t>(bytes), kBind, mask, 1025, 0) == 0;
}

// Pages on `node`, in huge ones if they may be, as weights lie.
std::uint8_t* allocate(std::int64_t bytes, int node, const std::vector<int>& touch,
                       const std::vector<int>& cpus) {
  void* memory = mmap(nullptr, static_cast<std::size_t>(bytes), PROT_READ | PROT_WRITE,
                      MAP_PRIVATE | MAP_ANONYMOUS, -1, 0);
  if (memory == MAP_FAILED) {
    std::fprintf(stderr, "no memory for %lld bytes\n", static_cast<long long>(bytes));
    std::exit(1);
  }
  madvise(memory, static_cast<std::size_t>(bytes), MADV_HUGEPAGE);
  if (!bind(memory, bytes, node) && touch.empty()) {
    std::fprintf(stderr, "memory cannot be bound to node %d\n", node);
    std::exit(1);
  }
  auto* data = static_cast<std::uint8_t*>(memory);
  const std::vector<int>& writers = touch.empty() ? cpus : touch;
  const int threads = static_cast<int>(writers.size());
  const std::int64_t part = bytes / threads;
  timed(writers, threads, 1, [&](int t, hetcomp::Lane&) {
    std::memset(data + t * part, 1, static_cast<std::size_t>(t == threads - 1 ? bytes - t * part : part));
  });
  return data;
}

// Every thread reads the same part again and again.
void print_set(const std::vector<int>& cpus, const std::uint8_t* data, std::int64_t bytes) {
  const auto threads = static_cast<std::int64_t>(cpus.size());
  const std::int64_t part = bytes / threads / kPage * kPage;
  const std::int64_t passes = std::max<std::int64_t>(1, kBytesOfASet / bytes);
  if (part == 0) return;
  const auto seconds = timed(cpus, static_cast<int>(threads), kRepeats, [&](int t, hetcomp::Lane&) {
    std::uint64_t sum = 0;
    for (std::int64_t i = 0; i < passes; ++i) {
      asm volatile("" : : : "memory");  // a second pass reads again
      sum ^= read_all(data + t * part, data + (t + 1) * part);
    }
    sink = sum;
  });
  const auto moved = static_cast<double>(part * threads * passes);
  print_readings(bytes, seconds, [&](double s) { return moved / s * 1e-9; });
}

void print_sets(const std::vector<int>& cpus, const std::uint8_t* data, std::int64_t bytes) {
  for (std::int64_t size = kSmallestSet; size <= bytes; size *= 2) print_set(cpus, data, size);
}

void print_barrier(const std::vector<int>& cpus) {
  constexpr int kRounds = 2000;
  const int all = static_cast<int>(cpus.size());
  const auto seconds = timed(cpus, all, kRepeats, [&](int, hetcomp::Lane& lane) {
    for (int i = 0; i < kRounds; ++i) hetcomp::barrier(lane);
  });
  print_readings(all, seconds, [](double s) { return s / kRounds * 1e6; });
}

}  // namespace

int main(int argc, char** argv) {
  if (argc != 6) {
    std::fprintf(stderr,
                 "usage: memory_probe read|all|sets|barrier MEBIBYTES CPU,CPU,... NODE CPU,CPU,...|-\n");
    return 2;
  }
  const std::string mode = argv[1];
  const std::int64_t bytes = std::atoll(argv[2]) << 20;
  const std::vector<int> cpus = cpu_list(argv[3]), touch = cpu_list(argv[5]);
  if (bytes <= 0 || cpus.empty()) return 2;
  const int all = static_cast<int>(cpus.size());
  const std::uint8_t* data = mode == "barrier" ? nullptr : allocate(bytes, std::atoi(argv[4]), touch, cpus);
  std::printf("[");
  if (mode == "read") {
    for (const int threads : thread_counts(all)) print_reads(cpus, threads, data, bytes);
  } else if (mode == "all") {
    print_reads(cpus, all, data, bytes);
  } else if (mode == "sets") {
    print_sets(cpus, data, bytes);
  } else if (mode == "barrier") {
    print_barrier(cpus);
  } else {
    return 2;
  }
  std::printf("]\n");
  return 0;
}
