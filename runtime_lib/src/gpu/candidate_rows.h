// The buffer in which a program gives the most likely tokens of its rows
// (hetcomp/backends/gpu/candidates.py).
#pragma once

#include <cstddef>
#include <cstdint>
#include <optional>
#include <span>
#include <vector>

#include "../candidates.h"

namespace hetcomp::gpu {

class CandidateRows {
 public:
  // Words of a row: segments in use (-1: none were found), bits of `least` and of `total`, one unused; tokens
  // of each segment; and of each place of each segment the bits of a logit, then of all of them the ids.
  static constexpr std::size_t kSegments = 32, kPlaces = 64, kHeader = 4;
  static constexpr std::size_t kWords = kHeader + kSegments + 2 * kSegments * kPlaces;

  CandidateRows() = default;
  explicit CandidateRows(std::span<const std::int32_t> words) : words_(words) {}
  bool empty() const { return words_.empty(); }

  // Those of a row, valid until the next call; none where the GPU found none, or more than have a place.
  std::optional<Candidates> read(std::size_t row);

 private:
  std::span<const std::int32_t> words_;
  std::vector<Candidate> tokens_;
};

}  // namespace hetcomp::gpu
