#include "candidate_order.h"

#include <array>
#include <bit>
#include <cstdint>
#include <utility>

namespace hetcomp {
namespace {

constexpr unsigned kDigitBits = 11;
constexpr std::uint32_t kDigits = 1U << kDigitBits;
constexpr unsigned kPasses = 3;  // of 11 bits: 32 and one to spare

// A number that is smaller the larger the logit.
std::uint32_t key(const Candidate& candidate) {
  const auto bits = std::bit_cast<std::uint32_t>(candidate.logit + 0.0F);  // -0 is 0
  return (bits >> 31) != 0 ? bits : ~(bits | 0x8000'0000U);
}

std::uint32_t digit(std::uint32_t of, unsigned pass) { return (of >> (pass * kDigitBits)) % kDigits; }

}  // namespace

// By radix from the least digit on: each pass keeps the order of equal digits, so that ids stay in order.
void sort_by_likelihood(std::vector<Candidate>& candidates) {
  std::array<std::array<std::uint32_t, kDigits>, kPasses> places{};
  for (const Candidate& candidate : candidates)
    for (unsigned pass = 0; pass < kPasses; ++pass) ++places[pass][digit(key(candidate), pass)];
  std::vector<Candidate> sorted(candidates.size());
  for (unsigned pass = 0; pass < kPasses; ++pass) {
    std::uint32_t place = 0;
    for (std::uint32_t& count : places[pass]) place += std::exchange(count, place);
    for (const Candidate& candidate : candidates)
      sorted[places[pass][digit(key(candidate), pass)]++] = candidate;
    candidates.swap(sorted);
  }
}

}  // namespace hetcomp
