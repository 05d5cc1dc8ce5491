#include "fake_program.h"

#include <limits>

#include "hetcomp/lane.h"
#include "hetcomp/program.h"

namespace hetcomp::fake {
namespace {

void append(Lane& lane, const hetcomp_step& s) {
  const auto* embed = reinterpret_cast<const float*>(s.weights[0]);
  auto* state = reinterpret_cast<float*>(s.states[0]);
  parallel_for(lane, s.n_tokens, 1, [&](std::int64_t begin, std::int64_t end) {
    for (std::int64_t t = begin; t < end; ++t) {
      if (s.ids[t] == kErrorId) lane.set->error.store(kErrorId);
      float* place = state + (s.slots[t] * s.context + s.positions[t]) * kWidth;
      for (std::int64_t d = 0; d < kWidth; ++d) place[d] = embed[s.ids[t] * kWidth + d];
    }
  });
}

void sum_up(Lane& lane, const hetcomp_step& s) {
  const auto* state = reinterpret_cast<const float*>(s.states[0]);
  auto* sums = reinterpret_cast<float*>(s.arena);
  parallel_for(lane, s.n_logit_rows, 1, [&](std::int64_t begin, std::int64_t end) {
    for (std::int64_t r = begin; r < end; ++r) {
      const std::int32_t t = s.logit_rows[r];
      for (std::int64_t d = 0; d < kWidth; ++d) {
        float sum = s.ids[t] == kNanId ? std::numeric_limits<float>::quiet_NaN() : 0;
        for (std::int64_t p = 0; p <= s.positions[t]; ++p)
          sum += static_cast<float>(p % 5 + 1) * state[(s.slots[t] * s.context + p) * kWidth + d];
        sums[r * kWidth + d] = sum;
      }
    }
  });
}

const hetcomp_pair* pair_of(const hetcomp_step& s, std::int64_t row) {
  const std::int32_t adapter = s.adapters == nullptr ? -1 : s.adapters->of_logit_row[row];
  return adapter < 0 ? nullptr : s.adapters->tables[adapter][1];
}

// h = scale a x of the rows that have an adapter.
void shrink(Lane& lane, const hetcomp_step& s) {
  const auto* sums = reinterpret_cast<const float*>(s.arena);
  parallel_for(lane, s.n_logit_rows, 1, [&](std::int64_t begin, std::int64_t end) {
    for (std::int64_t row = begin; row < end; ++row) {
      const hetcomp_pair* pair = pair_of(s, row);
      for (std::int64_t r = 0; pair != nullptr && r < pair->rank; ++r) {
        const auto* a = reinterpret_cast<const float*>(pair->a) + r * HETCOMP_PAIR_COLUMNS;
        float sum = 0;
        for (std::int64_t d = 0; d < kWidth; ++d) sum += a[d] * sums[row * kWidth + d];
        s.adapters->scratch[row * s.adapters->rank + r] = pair->scale * sum;
      }
    }
  });
}

void logits(Lane& lane, const hetcomp_step& s) {
  const auto* head = reinterpret_cast<const float*>(s.weights[1]);
  const auto* sums = reinterpret_cast<const float*>(s.arena);
  const std::int64_t tasks = s.n_logit_rows * kVocab;
  parallel_for(lane, tasks, grain_for(lane, tasks), [&](std::int64_t begin, std::int64_t end) {
    for (std::int64_t i = begin; i < end; ++i) {
      float sum = 0;
      for (std::int64_t d = 0; d < kWidth; ++d)
        sum += sums[i / kVocab * kWidth + d] * head[i % kVocab * kWidth + d];
      const hetcomp_pair* pair = pair_of(s, i / kVocab);
      for (std::int64_t r = 0; pair != nullptr && r < pair->rank; ++r) {
        const std::int64_t row = i % kVocab;
        const auto* b = reinterpret_cast<const float*>(pair->b) + (row / 16 * pair->rank + r) * 16;
        sum += b[row % 16] * s.adapters->scratch[i / kVocab * s.adapters->rank + r];
      }
      s.logits[i] = sum;
    }
  });
}

void run(Lane* lane, const hetcomp_step* s) {
  append(*lane, *s);
  barrier(*lane);
  if (lane->thread == 0 && s->lane_ns != nullptr) s->lane_ns[0] += 1'000'000;
  sum_up(*lane, *s);
  barrier(*lane);
  if (s->adapters != nullptr) {
    shrink(*lane, *s);
    barrier(*lane);
  }
  logits(*lane, *s);
  barrier(*lane);
}

// More than it reads, for who wants to see others loaded.
#ifndef FAKE_WEIGHTS
#define FAKE_WEIGHTS 2
#endif
#ifndef FAKE_NODES
#define FAKE_NODES 1
#endif
constexpr hetcomp_adaptable kAdaptable[FAKE_WEIGHTS] = {{}, {1, kVocab, kWidth, 1, 4}};

constexpr hetcomp_program kProgram = {
    .abi = HETCOMP_PROGRAM_ABI,
    .isa_size = 0,
    .isa = FAKE_ISA,
    .plan_hash = kPlanHash,
    .n_weights = FAKE_WEIGHTS,
    .n_states = 1,
    .arena_bytes = kMaxLogitRows * kWidth * 4,
    .max_tokens = kMaxTokens,
    .max_logit_rows = kMaxLogitRows,
    .vocab = kVocab,
    .n_timers = kTimers,
    .n_nodes = FAKE_NODES,
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
