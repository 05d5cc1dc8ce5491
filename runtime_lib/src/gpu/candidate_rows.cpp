#include "candidate_rows.h"

#include <bit>

namespace hetcomp::gpu {

std::optional<Candidates> CandidateRows::read(std::size_t row) {
  const std::span<const std::int32_t> words = words_.subspan(row * kWords, kWords);
  const std::int32_t segments = words[0];
  if (segments < 0 || segments > static_cast<std::int32_t>(kSegments)) return std::nullopt;
  tokens_.clear();
  const std::span<const std::int32_t> logits = words.subspan(kHeader + kSegments, kSegments * kPlaces);
  const std::span<const std::int32_t> ids = words.subspan(kHeader + kSegments + kSegments * kPlaces);
  for (std::size_t s = 0; s < static_cast<std::size_t>(segments); ++s) {
    const std::int32_t count = words[kHeader + s];
    if (count < 0 || count > static_cast<std::int32_t>(kPlaces)) return std::nullopt;
    for (std::size_t i = s * kPlaces; i < s * kPlaces + static_cast<std::size_t>(count); ++i)
      tokens_.push_back({std::bit_cast<float>(logits[i]), ids[i]});
  }
  return Candidates{tokens_, std::bit_cast<float>(words[1]), std::bit_cast<float>(words[2])};
}

}  // namespace hetcomp::gpu
