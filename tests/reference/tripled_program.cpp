// The CPU's part of hybrid_artifact.py: what the GPU hands over, times three.
#include "hetcomp/lane.h"
#include "hetcomp/program.h"

namespace {

constexpr std::int64_t kWidth = FAKE_WIDTH;

void run(hetcomp::Lane* lane, const hetcomp_step* s) {
  const auto* x = reinterpret_cast<const float*>(s->pinned[0]);
  auto* y = reinterpret_cast<float*>(s->pinned[1]);
  if (hetcomp::await_gpu(*lane, *s, 0)) {
    hetcomp::parallel_for(*lane, s->n_tokens * kWidth, 1, [&](std::int64_t begin, std::int64_t end) {
      for (std::int64_t i = begin; i < end; ++i) y[i] = 3 * x[i];
    });
    hetcomp::answer_gpu(*lane, *s, 0);
  }
  hetcomp::barrier(*lane);
}

constexpr hetcomp_program kProgram = {
    .abi = HETCOMP_PROGRAM_ABI,
    .isa_size = 0,
    .isa = "avx2",
    .plan_hash = FAKE_PLAN_HASH,
    .n_weights = 0,
    .n_states = 0,
    .arena_bytes = 0,
    .max_tokens = FAKE_TOKENS,
    .max_logit_rows = FAKE_LOGIT_ROWS,
    .vocab = FAKE_VOCAB,
    .n_timers = 0,
    .n_nodes = 1,
    .n_pinned = 2,
    .n_flags = 1,
    .run = run,
};

}  // namespace

extern "C" __attribute__((visibility("default"))) const hetcomp_program* hetcomp_program_entry(void) {
  return &kProgram;
}
