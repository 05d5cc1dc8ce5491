// A program with the sizes of fake_program.h whose one state is a recurrence's, as exact in any order:
//   state[slot] = embed[ids[p]] - state[slot], which is 0 before position 0
//   logits[v] = sum over d of state[slot][d] * head[v][d]
#include <algorithm>

#include "fake_program.h"
#include "hetcomp/lane.h"
#include "hetcomp/program.h"

namespace hetcomp::fake {
namespace {

void recur(Lane& lane, const hetcomp_step& s) {
  const auto* embed = reinterpret_cast<const float*>(s.weights[0]);
  auto* states = reinterpret_cast<float*>(s.states[0]);
  auto* rows = reinterpret_cast<float*>(s.arena);
  parallel_for(lane, kWidth, 1, [&](std::int64_t begin, std::int64_t end) {
    for (std::int64_t t = 0; t < s.n_tokens; ++t) {
      for (std::int64_t d = begin; d < end; ++d) {
        float& state = states[s.slots[t] * kWidth + d];
        state = embed[s.ids[t] * kWidth + d] - (s.positions[t] == 0 ? 0 : state);
        const std::int32_t* row = std::find(s.logit_rows, s.logit_rows + s.n_logit_rows, t);
        if (row != s.logit_rows + s.n_logit_rows) rows[(row - s.logit_rows) * kWidth + d] = state;
      }
      if (s.ids[t] == kErrorId) lane.set->error.store(kErrorId);
    }
  });
}

void logits(Lane& lane, const hetcomp_step& s) {
  const auto* head = reinterpret_cast<const float*>(s.weights[1]);
  const auto* rows = reinterpret_cast<const float*>(s.arena);
  const std::int64_t tasks = s.n_logit_rows * kVocab;
  parallel_for(lane, tasks, grain_for(lane, tasks), [&](std::int64_t begin, std::int64_t end) {
    for (std::int64_t i = begin; i < end; ++i) {
      float sum = 0;
      for (std::int64_t d = 0; d < kWidth; ++d)
        sum += rows[i / kVocab * kWidth + d] * head[i % kVocab * kWidth + d];
      s.logits[i] = sum;
    }
  });
}

void run(Lane* lane, const hetcomp_step* s) {
  recur(*lane, *s);
  barrier(*lane);
  logits(*lane, *s);
  barrier(*lane);
}

constexpr hetcomp_adaptable kAdaptable[2] = {};

constexpr hetcomp_program kProgram = {
    .abi = HETCOMP_PROGRAM_ABI,
    .isa_size = 0,
    .isa = FAKE_ISA,
    .plan_hash = kPlanHash,
    .n_weights = 2,
    .n_states = 1,
    .arena_bytes = kMaxLogitRows * kWidth * 4,
    .max_tokens = kMaxTokens,
    .max_logit_rows = kMaxLogitRows,
    .vocab = kVocab,
    .n_timers = kTimers,
    .n_nodes = 1,
    .n_pinned = 0,
    .n_flags = 0,
    .adaptable = kAdaptable,
    .adapter_floats = 0,
    .adapter_rows = kMaxLogitRows,
    .run = run,
};

}  // namespace
}  // namespace hetcomp::fake

extern "C" __attribute__((visibility("default"))) const hetcomp_program* hetcomp_program_entry(void) {
  return &hetcomp::fake::kProgram;
}
