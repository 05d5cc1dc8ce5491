// Measures what predictions need, for one instruction set (the one that this file is compiled for), and
// prints it as JSON: DRAM read bandwidth by thread count, GEMM and GEMV rates of the weight formats, the cost
// of a barrier.
//   probe MEBIBYTES CPU,CPU,...   one thread is pinned to each CPU, all of one NUMA node
// The loops have the shape of the CPU kernels (codegen_templates/cpu): panels of 16 weight rows, bf16 widened
// to f32, sums of a register tile.
#include <pthread.h>
#include <sched.h>
#include <sys/mman.h>

#include <algorithm>
#include <chrono>
#include <cstdint>
#include <cstdio>
#include <cstdlib>
#include <cstring>
#include <ctime>
#include <functional>
#include <thread>
#include <vector>

#include "hetcomp/lane.h"

namespace {

constexpr int kPanel = 16;  // weight rows of a panel
#ifdef __AVX512F__
constexpr int kWidth = 16, kTileRows = 12, kTilePanels = 2;
#else
constexpr int kWidth = 8, kTileRows = 6, kTilePanels = 1;
#endif
constexpr int kVectors = kPanel / kWidth;  // of a panel

using Float = float __attribute__((vector_size(kWidth * 4)));
using Bits = std::uint32_t __attribute__((vector_size(kWidth * 4)));
// load2: the weights of two adjacent k. bf16 is stored in pairs, as in the packed layout.
struct F32 {
  static constexpr const char* name = "f32";
  static constexpr int bytes = 4;
  static void load2(const std::uint8_t* p, Float& first, Float& second) {
    std::memcpy(&first, p, sizeof first);
    std::memcpy(&second, p + kPanel * 4, sizeof second);
  }
};

struct Bf16 {
  static constexpr const char* name = "bf16";
  static constexpr int bytes = 2;
  static void load2(const std::uint8_t* p, Float& first, Float& second) {
    Bits pairs;
    std::memcpy(&pairs, p, sizeof pairs);
    const Bits low = pairs << 16, high = pairs & 0xffff0000u;
    std::memcpy(&first, &low, sizeof first);
    std::memcpy(&second, &high, sizeof second);
  }
};

Float broadcast(float x) { return x - Float{}; }

// Makes the compiler compute all of what lies at `p`, read or not.
void keep(const void* p) { asm volatile("" : : "r"(p) : "memory"); }

// kTileRows x kTilePanels*16 sums over `depth`; weights and activations stay in cache.
template <class Format>
void gemm_tile(const std::uint8_t* weights, const float* x, std::int64_t depth, float* out) {
  Float sums[kTileRows][kTilePanels * kVectors] = {};
  for (std::int64_t k = 0; k < depth; k += 2) {
    Float w[2][kTilePanels * kVectors];
    for (int v = 0; v < kTilePanels * kVectors; ++v) {
      const std::int64_t panel = v / kVectors * depth + k, lane = v % kVectors * kWidth;
      const std::int64_t column = Format::bytes == 4 ? lane : lane * 2;
      Format::load2(weights + (panel * kPanel + column) * Format::bytes, w[0][v], w[1][v]);
    }
    for (int r = 0; r < kTileRows; ++r) {
      for (int i = 0; i < 2; ++i) {
        const Float a = broadcast(x[(k + i) * kTileRows + r]);
        for (int v = 0; v < kTilePanels * kVectors; ++v) sums[r][v] += a * w[i][v];
      }
    }
  }
  std::memcpy(out, sums, sizeof sums);
  keep(out);
}

// One panel times one row of activations, weights from memory: what decode does.
template <class Format>
float gemv_panel(const std::uint8_t* weights, const float* x, std::int64_t depth) {
  Float sums[4][kVectors] = {};
  for (std::int64_t k = 0; k < depth; k += 4) {
    const std::uint8_t* at = weights + k * kPanel * Format::bytes;
    for (int line = 0; line < 4 * kPanel * Format::bytes; line += 64) __builtin_prefetch(at + 2048 + line);
    for (int i = 0; i < 4; i += 2) {
      for (int v = 0; v < kVectors; ++v) {
        const int column = Format::bytes == 4 ? v * kWidth : v * kWidth * 2;
        Float first, second;
        Format::load2(at + (i * kPanel + column) * Format::bytes, first, second);
        sums[i][v] += broadcast(x[k + i]) * first;
        sums[i + 1][v] += broadcast(x[k + i + 1]) * second;
      }
    }
  }
  Float all{};
  for (auto& sum : sums)
    for (const Float& v : sum) all += v;
  keep(&all);
  return all[0];
}

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

// Time that this thread spent on a core: a rate of computing must not suffer from other processes.
double thread_seconds() {
  timespec t;
  clock_gettime(CLOCK_THREAD_CPUTIME_ID, &t);
  return static_cast<double>(t.tv_sec) + static_cast<double>(t.tv_nsec) * 1e-9;
}

double now() {
  return std::chrono::duration<double>(std::chrono::steady_clock::now().time_since_epoch()).count();
}

// Seconds that `threads` pinned threads take for work(thread, lane), between two barriers; the best of
// `repeats`.
double timed(const std::vector<int>& cpus, int threads, int repeats,
             const std::function<void(int, hetcomp::Lane&)>& work) {
  hetcomp::LaneSet set(threads);
  double best = 1e30;
  std::vector<std::thread> workers;
  for (int t = 0; t < threads; ++t) {
    workers.emplace_back([&, t] {
      cpu_set_t mask;
      CPU_ZERO(&mask);
      CPU_SET(cpus[static_cast<std::size_t>(t)], &mask);
      pthread_setaffinity_np(pthread_self(), sizeof mask, &mask);
      hetcomp::Lane lane{&set, t};
      for (int i = 0; i < repeats; ++i) {
        hetcomp::barrier(lane);
        const double start = now();
        work(t, lane);
        hetcomp::barrier(lane);
        if (t == 0) best = std::min(best, now() - start);
      }
    });
  }
  for (auto& worker : workers) worker.join();
  return best;
}

volatile float sink;

template <class Format>
void print_rates(const std::vector<int>& cpus, const std::uint8_t* data, std::int64_t bytes, bool last) {
  const int threads = static_cast<int>(cpus.size());
  constexpr std::int64_t kDepth = 512;
  constexpr int kCalls = 2000;
  std::vector<double> gemm(cpus.size() * 8, 1e30);  // one cache line a thread
  timed(cpus, threads, 5, [&](int t, hetcomp::Lane&) {
    std::vector<std::uint8_t> weights(kDepth * kTilePanels * kPanel * Format::bytes, 0);
    std::vector<float> x(kDepth * kTileRows, 1.0f);
    float out[kTileRows * kTilePanels * kPanel];
    const double start = thread_seconds();
    for (int i = 0; i < kCalls; ++i) {
      gemm_tile<Format>(weights.data(), x.data(), kDepth, out);
      sink = out[0];
    }
    double& best = gemm[static_cast<std::size_t>(t) * 8];
    best = std::min(best, thread_seconds() - start);
  });
  double slowest = 0;
  for (std::size_t t = 0; t < cpus.size(); ++t) slowest = std::max(slowest, gemm[t * 8]);
  const double flops = 2.0 * kTileRows * kTilePanels * kPanel * kDepth * kCalls;
  constexpr std::int64_t kColumns = 1024;
  constexpr std::int64_t kBytes = kColumns * kPanel * Format::bytes;
  const std::int64_t panels = bytes / kBytes / threads;
  const double gemv = timed(cpus, threads, 4, [&](int t, hetcomp::Lane&) {
    const std::vector<float> x(kColumns, 1.0f);
    float sum = 0;
    for (std::int64_t p = 0; p < panels; ++p)
      sum += gemv_panel<Format>(data + (t * panels + p) * kBytes, x.data(), kColumns);
    sink = sum;
  });
  std::printf("\"%s\": {\"gflops_per_core\": %.4f, \"gemv_gb_per_s\": %.4f}%s", Format::name,
              flops / slowest * 1e-9, static_cast<double>(panels * threads * kBytes) / gemv * 1e-9,
              last ? "" : ", ");
}

void print_bandwidth(const std::vector<int>& cpus, const std::uint8_t* data, std::int64_t bytes) {
  const int all = static_cast<int>(cpus.size());
  std::vector<int> counts;
  for (int n = 1; n < all; n *= 2) counts.push_back(n);
  if (all > 3) counts.push_back(all * 3 / 4);  // the best count is often below all cores
  counts.push_back(all);
  std::sort(counts.begin(), counts.end());
  counts.erase(std::unique(counts.begin(), counts.end()), counts.end());
  std::printf("\"read\": [");
  for (std::size_t i = 0; i < counts.size(); ++i) {
    const std::int64_t part = bytes / counts[i] / 4096 * 4096;
    const double seconds = timed(cpus, counts[i], 5, [&](int t, hetcomp::Lane&) {
      sink = static_cast<float>(read_all(data + t * part, data + (t + 1) * part));
    });
    std::printf("%s[%d, %.4f]", i ? ", " : "", counts[i],
                static_cast<double>(part * counts[i]) / seconds * 1e-9);
  }
  std::printf("], ");
}

// Reads over buffers that are passed over again and again: what the caches give while a working set fits.
void print_cached(const std::vector<int>& cpus, const std::uint8_t* data, std::int64_t bytes) {
  const int threads = static_cast<int>(cpus.size());
  std::printf("\"cached\": [");
  const char* comma = "";
  for (std::int64_t size = 256 << 10; size <= bytes; size *= 2) {
    const std::int64_t part = size / threads / 4096 * 4096;
    if (part == 0) continue;
    const std::int64_t passes = std::max<std::int64_t>(1, (256 << 20) / size);
    const double seconds = timed(cpus, threads, 4, [&](int t, hetcomp::Lane&) {
      for (std::int64_t i = 0; i < passes; ++i)
        sink = static_cast<float>(read_all(data + t * part, data + (t + 1) * part));
    });
    std::printf("%s[%lld, %.4f]", comma, static_cast<long long>(part * threads),
                static_cast<double>(part * threads * passes) / seconds * 1e-9);
    comma = ", ";
  }
  std::printf("], ");
}

void print_barrier(const std::vector<int>& cpus) {
  constexpr int kRounds = 2000;
  const double seconds = timed(cpus, static_cast<int>(cpus.size()), 5, [&](int, hetcomp::Lane& lane) {
    for (int i = 0; i < kRounds; ++i) hetcomp::barrier(lane);
  });
  std::printf("\"barrier_us\": %.4f, ", seconds / kRounds * 1e6);
}

}  // namespace

int main(int argc, char** argv) {
  if (argc != 3) {
    std::fprintf(stderr, "usage: probe MEBIBYTES CPU,CPU,...\n");
    return 2;
  }
  const std::int64_t bytes = std::atoll(argv[1]) << 20;
  std::vector<int> cpus;
  for (char* word = std::strtok(argv[2], ","); word; word = std::strtok(nullptr, ","))
    cpus.push_back(std::atoi(word));
  if (bytes <= 0 || cpus.empty()) return 2;
  void* memory = mmap(nullptr, static_cast<std::size_t>(bytes), PROT_READ | PROT_WRITE,
                      MAP_PRIVATE | MAP_ANONYMOUS, -1, 0);
  if (memory == MAP_FAILED) {
    std::fprintf(stderr, "no memory for %lld bytes\n", static_cast<long long>(bytes));
    return 1;
  }
  madvise(memory, static_cast<std::size_t>(bytes), MADV_HUGEPAGE);  // weights lie in huge pages when they may
  auto* data = static_cast<std::uint8_t*>(memory);
  const int threads = static_cast<int>(cpus.size());
  // Touched first by the node's own threads: the pages lie on the node.
  const std::int64_t part = bytes / threads;
  timed(cpus, threads, 1, [&](int t, hetcomp::Lane&) {
    std::memset(data + t * part, 1, static_cast<std::size_t>(t == threads - 1 ? bytes - t * part : part));
  });
  std::printf("{");
  print_bandwidth(cpus, data, bytes);
  print_cached(cpus, data, bytes);
  print_barrier(cpus);
  std::printf("\"rates\": {");
  print_rates<F32>(cpus, data, bytes, false);
  print_rates<Bf16>(cpus, data, bytes, true);
  std::printf("}}\n");
  return 0;
}
