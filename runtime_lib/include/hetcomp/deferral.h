// Expert deferral: which of a token's choices of experts are computed at once, and which are left to the next
// MoE layer. Included by generated programs whose plan defers experts.
#pragma once

#include <cstdint>

namespace hetcomp {

// What the experts of a layer do in a step that defers.
struct Deferral {
  std::int64_t choices;  // of each token, at most so many are deferred
  bool adds;             // the sum of what the MoE layer before deferred is added
  int turn;              // which of two buffers for the deferred choices the layer takes
};

// Divides ids[rows, top_k] into `now` and `later`, of the same shape, with -1 for choices of the other one:
// of a token's choices of experts that the CPU has (on_cpu[expert]; null: all) those of the `deferred`
// smallest weights[rows, top_k] are deferred, of equal weights the later choice first. A row's result depends
// on that row alone.
inline void divide_choices(std::int64_t rows, std::int64_t top_k, std::int64_t deferred, const bool* on_cpu,
                           const std::int32_t* ids, const float* weights, std::int32_t* now,
                           std::int32_t* later) {
  for (std::int64_t first = 0; first < rows * top_k; first += top_k) {
    const std::int32_t* const chosen = ids + first;
    const float* const weight = weights + first;
    const auto here = [&](std::int64_t i) { return on_cpu == nullptr || on_cpu[chosen[i]]; };
    for (std::int64_t i = 0; i < top_k; ++i) {
      std::int64_t before = 0;  // choices that are deferred rather than this one
      for (std::int64_t j = 0; j < top_k; ++j)
        before += here(j) && (weight[j] < weight[i] || (weight[j] == weight[i] && j > i)) ? 1 : 0;
      const bool left = here(i) && before < deferred;
      now[first + i] = here(i) && !left ? chosen[i] : -1;
      later[first + i] = left ? chosen[i] : -1;
    }
  }
}

}  // namespace hetcomp
