// Candidates from the most to the least likely, equal logits in the order of their ids.
#pragma once

#include <vector>

#include "candidates.h"

namespace hetcomp {

inline bool more_likely(const Candidate& a, const Candidate& b) {
  return a.logit != b.logit ? a.logit > b.logit : a.id < b.id;
}

// Sorts candidates that lie in the order of their ids; no logit is NaN. Made for whole vocabularies.
void sort_by_likelihood(std::vector<Candidate>& candidates);

}  // namespace hetcomp
