// Runs one kernel on a lane set of its own, for the tests: `threads` std::threads, SPMD, as in the runtime.
#include <cstring>
#include <memory>
#include <thread>
#include <vector>

#include "hetcomp/kernel.h"

namespace hetcomp::tvm {
extern char first_error[512];
}

// Runs the kernel `repeat` times; returns LaneSet::error.
extern "C" int run_kernel(hetcomp::KernelFn kernel, int threads, std::int64_t rows, const void* const* in,
                          void* const* out, void* workspace, std::int64_t repeat) {
  const auto set = std::make_unique<hetcomp::LaneSet>(threads);
  hetcomp_step step{};
  step.n_tokens = rows;
  const hetcomp::KernelArgs args{&step, rows, in, out, workspace};
  const auto body = [&](int thread) {
    hetcomp::Lane lane{set.get(), thread};
    for (std::int64_t i = 0; i < repeat; ++i) {
      kernel(lane, args);
      hetcomp::barrier(lane);
    }
  };
  std::vector<std::thread> others;
  for (int t = 1; t < threads; ++t) others.emplace_back(body, t);
  body(0);
  for (auto& thread : others) thread.join();
  return set->error.load();
}

extern "C" const char* first_error() { return hetcomp::tvm::first_error; }
