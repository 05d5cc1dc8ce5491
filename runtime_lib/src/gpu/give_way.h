// How a thread of the CPU waits for a GPU, when it has waited longer than a kernel of a decode step takes.
#pragma once

#include <algorithm>
#include <chrono>
#include <thread>

namespace hetcomp::gpu {

// Between two looks, after it has `waited` so long: gives its core to others, and behind 5 ms (a layer of a
// prompt) sleeps for a 128th of that, a millisecond at most, so that what it waits for is noticed 2 % late
// (with the 50 us of the kernel's timers), and the core is free meanwhile.
inline void give_way(std::chrono::steady_clock::duration waited) {
  using std::chrono::milliseconds;
  if (waited < milliseconds(5)) return std::this_thread::yield();
  std::this_thread::sleep_for(std::min<std::chrono::steady_clock::duration>(waited / 128, milliseconds(1)));
}

}  // namespace hetcomp::gpu
