// What every generated kernel looks like. Included by the rendered kernel and program sources.
//
// A kernel is called by all threads of the lane set (SPMD). On entry the inputs are visible to every thread.
// It may contain barriers between its own stages, but none after the last one: the program places a barrier
// only where a later op needs it.
#pragma once

#include <cstdint>

#include "hetcomp/lane.h"
#include "hetcomp/program.h"

namespace hetcomp {

// in/out: base addresses in the order of the op's inputs and outputs in the plan. Activations are dense,
// row-major, 64-byte aligned; weights are in the packed layout that the plan names.
// rows: the number of token rows (T), or of logit rows (R) for ops behind select_rows.
// workspace: the bytes that the plan reserved for this op, 64-byte aligned, contents undefined.
struct KernelArgs {
  const hetcomp_step* step;
  std::int64_t rows;
  const void* const* in;
  void* const* out;
  void* workspace;
};

using KernelFn = void (*)(Lane& lane, const KernelArgs& args);

}  // namespace hetcomp
