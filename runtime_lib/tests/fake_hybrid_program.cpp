// The CPU's part of the model of fake_hybrid.h.
#include "fake_program.h"
#include "hetcomp/lane.h"
#include "hetcomp/program.h"

namespace hetcomp::fake {
namespace {

// y[n_tokens, kWidth] = factor * x + bias
void expert(Lane& lane, const hetcomp_step& s, const std::uint8_t* from, std::uint8_t* to, float factor,
            const float* bias) {
  const auto* x = reinterpret_cast<const float*>(from);
  auto* y = reinterpret_cast<float*>(to);
  parallel_for(lane, s.n_tokens, 1, [&](std::int64_t begin, std::int64_t end) {
    for (std::int64_t t = begin; t < end; ++t) {
      if (s.ids[t] == kErrorId) lane.set->error.store(kErrorId);
      for (std::int64_t d = 0; d < kWidth; ++d)
        y[t * kWidth + d] = factor * x[t * kWidth + d] + (bias == nullptr ? 0 : bias[d]);
    }
  });
}

void layers(Lane& lane, const hetcomp_step& s) {
  if (!await_gpu(lane, s, 0)) return;
  if (lane.thread == 0 && s.lane_ns != nullptr) {
    s.lane_ns[0] += 1'000'000;
    if (s.defer_experts != 0) s.lane_ns[1] += 1'000'000;
  }
  expert(lane, s, s.pinned[0], s.pinned[1], 3, nullptr);
  answer_gpu(lane, s, 0);
  if (!await_gpu(lane, s, 1)) return;
  expert(lane, s, s.pinned[2], s.pinned[3], 2, reinterpret_cast<const float*>(s.weights[0]));
  answer_gpu(lane, s, 1);
}

void run(Lane* lane, const hetcomp_step* s) {
  layers(*lane, *s);
  barrier(*lane);
}

constexpr hetcomp_program kProgram = {
    .abi = HETCOMP_PROGRAM_ABI,
    .isa_size = 0,
    .isa = FAKE_ISA,
    .plan_hash = kPlanHash,
    .n_weights = 1,
    .n_states = 0,
    .arena_bytes = 0,
    .max_tokens = kMaxTokens,
    .max_logit_rows = kMaxLogitRows,
    .vocab = kVocab,
    .n_timers = kTimers,
    .n_nodes = 1,
    .n_pinned = 4,
    .n_flags = 2,
    .adaptable = nullptr,
    .adapter_floats = 0,
    .adapter_rows = 0,
    .run = run,
};

}  // namespace
}  // namespace hetcomp::fake

extern "C" __attribute__((visibility("default"))) const hetcomp_program* hetcomp_program_entry(void) {
  return &hetcomp::fake::kProgram;
}
