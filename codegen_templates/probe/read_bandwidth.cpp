// Reads a large buffer with 1 .. n threads and prints the DRAM read bandwidth of each count as JSON.
//   read_bandwidth THREADS [MEBIBYTES=2048] [REPEATS=5] [FIRST=1] [CPU,CPU,...]
// Counts go from FIRST to THREADS. With a list of CPUs thread i keeps to the i-th, and the buffer lies on
// the NUMA node of the first. Threads draw parts of the buffer, as those of kernels draw their tasks: in
// equal parts the slowest thread would say how fast memory is. They stream them with four independent
// chains of vector loads, as a GEMV kernel would. Huge pages are asked for: decode speed is bounded by what
// the machine gives with them.
#include <sched.h>
#include <sys/mman.h>

#include <algorithm>
#include <atomic>
#include <chrono>
#include <cstdint>
#include <cstdio>
#include <cstdlib>
#include <thread>
#include <vector>

namespace {

constexpr std::size_t kDraw = 256 << 10;  // bytes of a part, as memory_probe.cpp's

using Vector = std::uint64_t __attribute__((vector_size(64)));

std::uint64_t stream(const std::uint8_t* begin, const std::uint8_t* end) {
  Vector sums[4] = {};
  for (const std::uint8_t* p = begin; p + sizeof(sums) <= end; p += sizeof(sums)) {
    const auto* v = reinterpret_cast<const Vector*>(p);
    for (int i = 0; i < 4; ++i) sums[i] ^= v[i];
  }
  const Vector all = (sums[0] ^ sums[1]) ^ (sums[2] ^ sums[3]);
  std::uint64_t result = 0;
  for (int i = 0; i < 8; ++i) result ^= all[i];
  return result;
}

// Keeps the calling thread to the index-th CPU, if there are any.
bool pin(const std::vector<int>& cpus, int index) {
  if (cpus.empty()) return true;
  cpu_set_t mask;
  CPU_ZERO(&mask);
  CPU_SET(cpus[static_cast<std::size_t>(index)], &mask);
  return sched_setaffinity(0, sizeof mask, &mask) == 0;
}

double seconds_of_one_pass(const std::uint8_t* data, std::size_t bytes, int threads,
                           const std::vector<int>& cpus, std::uint64_t* sink) {
  std::atomic<int> ready{0};
  std::atomic<bool> go{false};
  std::atomic<std::size_t> drawn{0};
  std::vector<std::uint64_t> sums(static_cast<std::size_t>(threads) * 8);  // one cache line a thread
  std::vector<std::thread> workers;
  const std::size_t parts = bytes / kDraw;
  for (int t = 0; t < threads; ++t) {
    workers.emplace_back([&, t] {
      pin(cpus, t);
      ready.fetch_add(1);
      while (!go.load(std::memory_order_acquire)) {
      }
      std::uint64_t sum = 0;
      for (std::size_t i = drawn.fetch_add(1); i < parts; i = drawn.fetch_add(1))
        sum ^= stream(data + i * kDraw, data + (i + 1) * kDraw);
      sums[static_cast<std::size_t>(t) * 8] = sum;
    });
  }
  while (ready.load() != threads) std::this_thread::yield();
  const auto start = std::chrono::steady_clock::now();
  go.store(true, std::memory_order_release);
  for (auto& worker : workers) worker.join();
  const std::chrono::duration<double> elapsed = std::chrono::steady_clock::now() - start;
  for (const std::uint64_t sum : sums) *sink ^= sum;
  return elapsed.count() * static_cast<double>(bytes) / static_cast<double>(parts * kDraw);
}

}  // namespace

int main(int argc, char** argv) {
  const int max_threads = argc > 1 ? std::atoi(argv[1]) : 0;
  const std::size_t bytes = static_cast<std::size_t>(argc > 2 ? std::atoi(argv[2]) : 2048) << 20;
  const int repeats = argc > 3 ? std::atoi(argv[3]) : 5;
  const int first = argc > 4 ? std::atoi(argv[4]) : 1;
  std::vector<int> cpus;
  for (const char* at = argc > 5 ? argv[5] : ""; *at != 0;) {
    char* end = nullptr;
    cpus.push_back(static_cast<int>(std::strtol(at, &end, 10)));
    if (end == at || cpus.back() < 0 || cpus.back() >= CPU_SETSIZE) {
      std::fprintf(stderr, "read_bandwidth: %s is not a list of CPUs\n", argv[5]);
      return 2;
    }
    at = *end == ',' ? end + 1 : end;
  }
  const bool enough = cpus.empty() || cpus.size() >= static_cast<std::size_t>(std::max(max_threads, 1));
  if (first < 1 || max_threads < first || bytes == 0 || repeats < 1 || !enough) {
    std::fprintf(stderr, "usage: read_bandwidth THREADS [MEBIBYTES] [REPEATS] [FIRST] [CPU,CPU,...]\n");
    return 2;
  }
  if (!pin(cpus, 0)) {
    std::fprintf(stderr, "read_bandwidth: this process may not use CPU %d\n", cpus[0]);
    return 1;
  }
  void* memory = mmap(nullptr, bytes, PROT_READ | PROT_WRITE, MAP_PRIVATE | MAP_ANONYMOUS, -1, 0);
  if (memory == MAP_FAILED) {
    std::fprintf(stderr, "read_bandwidth: no memory for %zu bytes\n", bytes);
    return 1;
  }
  madvise(memory, bytes, MADV_HUGEPAGE);  // only a hint: without it the figure is that of 4 KB pages
  auto* data = static_cast<std::uint8_t*>(memory);
  std::fill_n(data, bytes, std::uint8_t{0x5a});
  std::uint64_t sink = 0;
  std::printf("[");
  for (int threads = first; threads <= max_threads; ++threads) {
    std::printf("%s[", threads == first ? "" : ", ");
    for (int i = 0; i < repeats; ++i) {
      const double seconds = seconds_of_one_pass(data, bytes, threads, cpus, &sink);
      std::printf("%s%.3f", i == 0 ? "" : ", ", static_cast<double>(bytes) / seconds * 1e-9);
    }
    std::printf("]");
  }
  std::printf("]\n");
  // An even number of equal parts cancels out; the comparison only keeps the loads alive.
  return sink == 1 ? 3 : 0;
}
