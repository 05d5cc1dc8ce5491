// Tasks that the threads of one call take in turn.
#pragma once

#include <algorithm>
#include <atomic>
#include <cstddef>
#include <cstdint>
#include <system_error>
#include <thread>
#include <vector>

namespace hetcomp::quantise {

// False if the system has no more threads: those that run then do the work.
template <class Work>
bool started(std::vector<std::jthread>& threads, const Work& work) {
  try {
    threads.emplace_back(work);
    return true;
  } catch (const std::system_error&) {
    return false;
  }
}

// Calls work(i) for i from 0 to count - 1 on at most so many threads, this one included. work must not throw.
template <class Work>
void in_parallel(std::size_t count, int32_t threads, const Work& work) {
  std::atomic<std::size_t> next{0};
  const auto loop = [&] {
    for (std::size_t i = next++; i < count; i = next++) work(i);
  };
  std::vector<std::jthread> others;
  const std::size_t wanted = std::min<std::size_t>(static_cast<std::size_t>(threads), count);
  for (std::size_t i = 1; i < wanted && started(others, loop); ++i) {
  }
  loop();
}

// What is compiled for several instruction sets: x86-64-v4, v3, or null where the CPU has neither.
template <class Function>
Function best_for_this_cpu(Function avx512, Function avx2) {
  __builtin_cpu_init();
  if (__builtin_cpu_supports("avx512f") && __builtin_cpu_supports("avx512cd") &&
      __builtin_cpu_supports("avx512bw") && __builtin_cpu_supports("avx512dq") &&
      __builtin_cpu_supports("avx512vl")) {
    return avx512;
  }
  if (__builtin_cpu_supports("avx2") && __builtin_cpu_supports("f16c") && __builtin_cpu_supports("fma") &&
      __builtin_cpu_supports("bmi2")) {
    return avx2;
  }
  return nullptr;
}

}  // namespace hetcomp::quantise
