// Runs one generated kernel on a lane set of N std::threads, for the Python tests (ctypes).
#include <sys/syscall.h>
#include <time.h>
#include <unistd.h>

#include <thread>
#include <vector>

#include "hetcomp/kernel.h"

// kernel: address of a KernelFn. Calls it `calls` times on `threads` threads, call c with the inputs
// in[c % sets][0 .. n_in), and returns the seconds of all calls as thread 0 sees them. adapted: null, or the
// adapters of the op's rows.
extern "C" double hetcomp_harness_run(void* kernel, int threads, int calls, const hetcomp_step* step,
                                      std::int64_t rows, int sets, int n_in, const void* const* in,
                                      void* const* out, void* workspace, const hetcomp::AdaptedOp* adapted) {
  using namespace hetcomp;
  // AMX: the process asks for its tiles (ARCH_REQ_XCOMP_PERM of XFEATURE_XTILEDATA); elsewhere that fails.
  syscall(SYS_arch_prctl, 0x1023, 18);
  const auto fn = reinterpret_cast<KernelFn>(kernel);
  LaneSet set(threads);
  double seconds = 0;
  const auto work = [&](int thread) {
    Lane lane{&set, thread};
    barrier(lane);
    timespec begin{}, end{};
    clock_gettime(CLOCK_MONOTONIC, &begin);
    for (int c = 0; c < calls; ++c) {
      fn(lane, KernelArgs{step, rows, in + c % sets * n_in, out, workspace, adapted});
      barrier(lane);
    }
    clock_gettime(CLOCK_MONOTONIC, &end);
    if (thread == 0)
      seconds = static_cast<double>(end.tv_sec - begin.tv_sec) +
                1e-9 * static_cast<double>(end.tv_nsec - begin.tv_nsec);
  };
  std::vector<std::thread> workers;
  for (int t = 1; t < threads; ++t) workers.emplace_back(work, t);
  work(0);
  for (std::thread& w : workers) w.join();
  return seconds;
}
