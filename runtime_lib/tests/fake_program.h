// The model of fake_program.cpp. All values are small whole numbers, so its results are exact in any order.
//   state[slot][p] = embed[ids[p]]
//   logits[v] = sum over p <= position, d of (p % 5 + 1) * state[slot][p][d] * head[v][d]
// Adapters may change the head (fake_adapter.h).
#pragma once

#include <cstdint>

#ifndef FAKE_VOCAB
#define FAKE_VOCAB 97
#endif
#ifndef FAKE_ISA
#define FAKE_ISA "avx2"
#endif

namespace hetcomp::fake {

inline constexpr std::int64_t kVocab = FAKE_VOCAB;
inline constexpr std::int64_t kWidth = 8;
inline constexpr std::int64_t kMaxTokens = 7;
inline constexpr std::int64_t kMaxLogitRows = 5;
inline constexpr std::int64_t kTimers = 2;
inline constexpr std::int32_t kErrorId = 13;  // a kernel reports this error when it sees this token
inline constexpr std::int32_t kNanId = 14;    // logits after this token are NaN
inline constexpr const char* kPlan = "{}";
inline constexpr const char* kPlanHash = "44136fa355b3678a1146ad16f7e8649e94fb4fc21fe77e8310c060f61caaff8a";

}  // namespace hetcomp::fake
