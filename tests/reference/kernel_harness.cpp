// Runs one generated kernel on a lane set of N std::threads, for the Python tests (ctypes).
#include <time.h>

#include <thread>
#include <vector>

#include "hetcomp/kernel.h"

// kernel: address of a KernelFn. Calls it `repeats` times on `threads` threads and returns the seconds of the
// fastest call as thread 0 sees it.
extern "C" double hetcomp_harness_run(void* kernel, int threads, int repeats, const hetcomp_step* step,
                                      std::int64_t rows, const void* const* in, void* const* out, void* workspace) {
  using namespace hetcomp;
  const auto fn = reinterpret_cast<KernelFn>(kernel);
  LaneSet set(threads);
  const KernelArgs args{step, rows, in, out, workspace};
  double best = 1e30;
  const auto work = [&](int thread) {
    Lane lane{&set, thread};
    for (int r = 0; r < repeats; ++r) {
      barrier(lane);
      timespec begin{}, end{};
      clock_gettime(CLOCK_MONOTONIC, &begin);
      fn(lane, args);
      barrier(lane);
      clock_gettime(CLOCK_MONOTONIC, &end);
      const double seconds =
          static_cast<double>(end.tv_sec - begin.tv_sec) + 1e-9 * static_cast<double>(end.tv_nsec - begin.tv_nsec);
      if (thread == 0 && seconds < best) best = seconds;
    }
  };
  std::vector<std::thread> workers;
  for (int t = 1; t < threads; ++t) workers.emplace_back(work, t);
  work(0);
  for (std::thread& w : workers) w.join();
  return best;
}
