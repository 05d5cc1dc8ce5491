// Host memory under both loads: CPU threads that read it, and the GPU's copy engine.
#pragma once

#include <pthread.h>
#include <sched.h>
#include <sys/mman.h>

#include <cstring>

#include "gpu_probe_session.h"

namespace gpu_probe {

struct Request {
  std::size_t cpu_bytes;
  std::vector<int> cpus;
  bool quick;
  int repeats() const { return quick ? 3 : 9; }
};

// CPU threads, each pinned, that read their own parts of a large buffer over and over.
class CpuReaders {
 public:
  CpuReaders(const std::vector<int>& cpus, std::size_t bytes) : bytes_(bytes / cpus.size() / kMebi * kMebi) {
    for (const int cpu : cpus) threads_.emplace_back([this, cpu] { run(cpu); });
    while (ready_ + failed_ < static_cast<int>(threads_.size())) std::this_thread::yield();
  }
  ~CpuReaders() {
    stop_ = true;
    for (auto& thread : threads_) thread.join();
  }
  CpuReaders(const CpuReaders&) = delete;
  void pause(bool pause) { paused_ = pause; }
  std::uint64_t bytes() const { return read_; }
  bool failed() const { return failed_ > 0; }

 private:
  using Word = std::uint64_t __attribute__((vector_size(64)));

  void run(int cpu) {
    cpu_set_t mask;
    CPU_ZERO(&mask);
    CPU_SET(static_cast<unsigned>(cpu), &mask);
    pthread_setaffinity_np(pthread_self(), sizeof mask, &mask);
    void* memory = mmap(nullptr, bytes_, PROT_READ | PROT_WRITE, MAP_PRIVATE | MAP_ANONYMOUS, -1, 0);
    if (bytes_ == 0 || memory == MAP_FAILED) {
      ++failed_;
      return;
    }
    madvise(memory, bytes_, MADV_HUGEPAGE);
    std::memset(memory, 1, bytes_);
    ++ready_;
    const auto* words = static_cast<const Word*>(memory);
    for (std::size_t at = 0; !stop_; at = at + kMebi < bytes_ ? at + kMebi : 0) {
      while (paused_ && !stop_) std::this_thread::yield();
      Word sums[4] = {};
      for (std::size_t i = at / sizeof(Word); i < (at + kMebi) / sizeof(Word); i += 4)
        for (std::size_t j = 0; j < 4; ++j) sums[j] ^= words[i + j];
      asm volatile("" : : "r"(sums) : "memory");  // the sums count as used
      read_ += kMebi;
    }
    munmap(memory, bytes_);
  }

  std::size_t bytes_;
  std::atomic<bool> stop_{false}, paused_{true};
  std::atomic<int> ready_{0}, failed_{0};
  std::atomic<std::uint64_t> read_{0};
  std::vector<std::thread> threads_;
};

// GB/s that CPU threads (all cores but one) read and that the GPU pulls from host memory, each alone and
// together.
inline std::string joint(const Session& session, const Request& request) {
  std::vector<int> cpus = request.cpus;
  if (cpus.size() > 1) cpus.pop_back();
  const std::size_t block = std::min(64 * kMebi, session.free_bytes() / 4), blocks = 4;
  const PinnedMemory host(session, block * blocks);
  std::memset(host.at, 1, block * blocks);
  const DeviceMemory device(session, block);
  CpuReaders readers(cpus, request.cpu_bytes);
  if (readers.failed()) throw Failure("Too little host memory is free to measure CPU reads beside copies.");
  session.watchdog.arm();
  const double seconds = request.quick ? 0.1 : 0.5;
  const auto phase = [&](bool cpu, bool gpu) {
    readers.pause(!cpu);
    std::this_thread::sleep_for(std::chrono::milliseconds(20));
    const std::uint64_t read = readers.bytes();
    std::uint64_t pulled = 0;
    const double start = now();
    while (now() - start < seconds) {
      if (!gpu) std::this_thread::sleep_for(std::chrono::milliseconds(10));
      for (std::size_t i = 0; gpu && i < blocks; ++i, pulled += block)
        session.cuda.cuMemcpyHtoDAsync(device.at, static_cast<char*>(host.at) + i * block, block,
                                       session.stream);
      session.wait();
    }
    const double scale = 1e-9 / (now() - start);
    return std::pair(static_cast<double>(readers.bytes() - read) * scale,
                     static_cast<double>(pulled) * scale);
  };
  const double cpu_alone = phase(true, false).first, copy_alone = phase(false, true).second;
  std::vector<double> sums, cpu, copy;
  for (int i = 0; i < 3; ++i) {
    const auto [read, pulled] = phase(true, true);
    sums.push_back(read + pulled);
    cpu.push_back(read);
    copy.push_back(pulled);
  }
  return "{\"gb_per_s\": " + number(median(sums)) + ", \"samples\": " + list(sums) +
         ", \"cpu\": " + list(cpu) + ", \"copy\": " + list(copy) + ", \"cpu_alone\": " + number(cpu_alone) +
         ", \"copy_alone\": " + number(copy_alone) + ", \"threads\": " + std::to_string(cpus.size()) + "}";
}

}  // namespace gpu_probe
