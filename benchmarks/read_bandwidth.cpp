// Reads a large buffer with 1 .. n threads and prints the DRAM read bandwidth of each count as JSON.
//   read_bandwidth THREADS [MEBIBYTES=2048] [REPEATS=5]
// Every thread streams its own contiguous part with four independent chains of vector loads, as a GEMV kernel
// would. Huge pages are asked for: decode speed is bounded by what the machine gives with them.
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

double seconds_of_one_pass(const std::uint8_t* data, std::size_t bytes, int threads, std::uint64_t* sink) {
  std::atomic<int> ready{0};
  std::atomic<bool> go{false};
  std::vector<std::uint64_t> sums(static_cast<std::size_t>(threads) * 8);  // one cache line a thread
  std::vector<std::thread> workers;
  const std::size_t part = bytes / static_cast<std::size_t>(threads) / 4096 * 4096;
  for (int t = 0; t < threads; ++t) {
    workers.emplace_back([&, t] {
      ready.fetch_add(1);
      while (!go.load(std::memory_order_acquire)) {
      }
      const std::uint8_t* begin = data + part * static_cast<std::size_t>(t);
      sums[static_cast<std::size_t>(t) * 8] = stream(begin, begin + part);
    });
  }
  while (ready.load() != threads) std::this_thread::yield();
  const auto start = std::chrono::steady_clock::now();
  go.store(true, std::memory_order_release);
  for (auto& worker : workers) worker.join();
  const std::chrono::duration<double> elapsed = std::chrono::steady_clock::now() - start;
  for (const std::uint64_t sum : sums) *sink ^= sum;
  return elapsed.count() * static_cast<double>(bytes) /
         static_cast<double>(part * static_cast<std::size_t>(threads));
}

}  // namespace

int main(int argc, char** argv) {
  const int max_threads = argc > 1 ? std::atoi(argv[1]) : 0;
  const std::size_t bytes = static_cast<std::size_t>(argc > 2 ? std::atoi(argv[2]) : 2048) << 20;
  const int repeats = argc > 3 ? std::atoi(argv[3]) : 5;
  if (max_threads < 1 || bytes == 0 || repeats < 1) {
    std::fprintf(stderr, "usage: read_bandwidth THREADS [MEBIBYTES] [REPEATS]\n");
    return 2;
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
  for (int threads = 1; threads <= max_threads; ++threads) {
    std::printf("%s[", threads == 1 ? "" : ", ");
    for (int i = 0; i < repeats; ++i) {
      const double seconds = seconds_of_one_pass(data, bytes, threads, &sink);
      std::printf("%s%.3f", i == 0 ? "" : ", ", static_cast<double>(bytes) / seconds * 1e-9);
    }
    std::printf("]");
  }
  std::printf("]\n");
  // An even number of equal parts cancels out; the comparison only keeps the loads alive.
  return sink == 1 ? 3 : 0;
}
