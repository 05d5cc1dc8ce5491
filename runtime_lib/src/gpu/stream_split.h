// Which of a layer's experts the GPU computes from weights that are copied to it, and which the CPU, in a
// step of a prompt.
#pragma once

#include <cstddef>
#include <cstdint>
#include <span>
#include <utility>
#include <vector>

namespace hetcomp::gpu {

// Microseconds at a few numbers of tokens, ascending; straight lines between them and beyond.
class TimeCurve {
 public:
  // points: at least one.
  explicit TimeCurve(std::vector<std::pair<std::int64_t, double>> points) : points_(std::move(points)) {}
  double at(double tokens) const;

 private:
  std::vector<std::pair<std::int64_t, double>> points_;
};

struct StreamRates {
  double link_bytes_per_us;   // from the host's memory to the GPU
  double joint_bytes_per_us;  // what the host's memory gives to the CPU and to the copies together
  TimeCurve cpu_expert_us;    // an expert of so many tokens, while nothing is copied
  TimeCurve gpu_expert_us;
};

struct SplitInput {
  std::span<const std::int32_t> tokens;  // of each expert that the GPU has not got, in the order to copy them
  std::size_t copied;                    // so many are, or will be, whatever is decided
  std::size_t most;                      // at most so many can be; at least `copied`
  std::size_t slots;                     // for copies: more of them must wait until some are computed
  std::int64_t step_tokens;
  double lead_us;           // so long before the layer's routing is known its copies have begun
  double resident_us;       // of the experts that the GPU has
  double expert_bytes;      // to copy one
  double activation_bytes;  // of a row that CPU and GPU hand to each other
};

struct Split {
  std::size_t copied;   // experts, from the first on
  double link_free_us;  // so long before the layer is done these copies are
};

// The number of copies with which a layer is done first; the link is free for the next layer's before that.
// It depends on nothing but its arguments, on no clock: a prompt gets the same numbers each time.
Split split_experts(const SplitInput& input, const StreamRates& rates);

// Of a ring of two waves, how many slots copies leave free that are made before the layer's routing is known:
// what is decided then has to be copied while the GPU computes the first wave, each expert for `each` tokens.
std::size_t slots_left(std::size_t wave, double each, double expert_bytes, const StreamRates& rates);

}  // namespace hetcomp::gpu
