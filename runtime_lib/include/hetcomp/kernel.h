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

// Where an op finds what adapters add to the products with its weights.
struct AdaptedOp {
  const hetcomp_adapters* adapters;
  std::int64_t weights[2];     // indices of its weights that adapters may change; of experts gate_up and down
  const std::int32_t* of_row;  // by row of the op: the adapter, -1: none
  float* scratch;              // the op's own
};

// Fills `op` and returns it; null if no adapter of the step changes these weights (of one weight both are
// it). floats, rows: what other ops have of the scratch memory before this one.
inline const AdaptedOp* adapt(AdaptedOp& op, const hetcomp_step& step, std::int64_t first,
                              std::int64_t second, bool logit_rows, std::int64_t floats, std::int64_t rows) {
  const hetcomp_adapters* const all = step.adapters;
  if (all == nullptr) return nullptr;
  bool any = false;
  for (std::int64_t i = 0; i < all->n; ++i)
    any = any || all->tables[i][first] != nullptr || all->tables[i][second] != nullptr;
  op = {all,
        {first, second},
        logit_rows ? all->of_logit_row : all->of_token,
        all->scratch + floats + rows * all->rank};
  return any ? &op : nullptr;
}

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
  const AdaptedOp* adapted = nullptr;  // null: no adapter changes what the op computes
};

using KernelFn = void (*)(Lane& lane, const KernelArgs& args);

}  // namespace hetcomp
